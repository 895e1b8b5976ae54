"""Pruned models made smaller and faster: packed files."""
