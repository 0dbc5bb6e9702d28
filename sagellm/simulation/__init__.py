"""Simulations of a graph: what runs, what is measured, and how results are shown."""
