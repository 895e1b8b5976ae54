"""Evidence: what training with zeros reaches, beside what was published, over paired seeds."""
