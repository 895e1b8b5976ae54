"""The pure core: tensors in, tensors or integers out. No modules, files, processes, logging or hidden randomness."""
