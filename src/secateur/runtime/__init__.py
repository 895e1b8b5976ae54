"""What a pruned model becomes: packed tensors, sparse modules, files for other runtimes."""
