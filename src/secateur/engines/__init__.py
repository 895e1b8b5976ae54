"""Where jobs run: one after the other, in processes beside each other, or on Ray."""
