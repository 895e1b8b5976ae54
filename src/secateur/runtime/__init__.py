"""Pruned models made smaller and faster: packed files, packed layers, exporters, and what they were measured to do."""
