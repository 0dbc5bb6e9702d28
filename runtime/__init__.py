"""Floor 2, the running of graphs: executors, engine, KV pools, the operator protocol."""
