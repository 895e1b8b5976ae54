"""The first cut: two small networks and a real encoder, pruned in one shot, and what each choice cost."""
