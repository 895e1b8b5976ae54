"""Facts counted from what was written, and how they are shown."""
