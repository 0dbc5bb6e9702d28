"""A layered layout of boxes, labels and edges, which knows nothing of graphs but their shape."""
