"""A layered layout of boxes, labels and edges. It has no knowledge of operators and kernels."""
