"""Scenarios: faults that are injected into a graph with worker processes, and checks of it."""
