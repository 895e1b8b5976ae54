"""Solvers: methods that choose what goes and also move what stays, one layer's matrix at a time, from its Hessian."""
