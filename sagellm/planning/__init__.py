"""Planning: the placements of a model that meet a service level, and what bounds a graph."""
