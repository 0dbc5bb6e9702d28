"""The `simulation` executor: the same core and operators, in simulated time."""
