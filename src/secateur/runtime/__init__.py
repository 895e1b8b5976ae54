"""Pruned models made smaller and faster: packed modules, packed files, exporters, and what they measure."""
