"""A layered layout of boxes, labels and edges, which knows nothing of operators and kernels."""
