"""Faults on purpose: scenarios of what happens to a graph of processes, and what must hold then."""
