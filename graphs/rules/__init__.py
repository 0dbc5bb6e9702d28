"""The rules of a stream graph. `sagellm.graphs.check` applies them."""
