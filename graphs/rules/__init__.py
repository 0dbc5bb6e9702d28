"""Rules that a stream graph obeys, one mistake each; `sagellm.graphs.check` applies them."""
