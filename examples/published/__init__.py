"""What the recipes of published results need: their data from local folders, their models, losses and loops, and stand-ins."""
