"""CPU kernels in C, compiled on the user's machine on first use."""
