"""Floor 2, what makes a graph run: executors, engine, KV pools, the operator protocol."""
