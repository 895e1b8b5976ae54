"""Programs that use secateur on real data, run from the repository's root: ``python -m examples.<name>``."""
