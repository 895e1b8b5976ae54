"""Measurements of a network, and what makes them comparable."""
