"""The first cut: two small networks and a real encoder, pruned in one shot every way, and what each choice cost."""
