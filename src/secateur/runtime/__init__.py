"""Pruned models that are smaller and faster: packed files, sparse modules, and what they were measured to do."""
