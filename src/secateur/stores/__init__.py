"""Where tensors live: the protocol, and the store for tensors in memory."""
