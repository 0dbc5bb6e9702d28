"""The rules of a stream graph. `sagellm.graphs.check` has the table and applies the rules."""
