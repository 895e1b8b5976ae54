"""One file a format: each writes a model, runs what it wrote, and says what is gained and what is not."""
