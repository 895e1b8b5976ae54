"""Recipes: a whole experiment in one YAML file."""
