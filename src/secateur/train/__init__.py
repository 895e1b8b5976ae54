"""Masks that live through training."""
