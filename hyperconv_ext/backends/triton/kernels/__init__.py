"""The Triton kernels: each computes what its docstring says on the row map of `backends.lattice`."""
