"""Injected faults: scenarios of events that hit a graph of processes, and checks that must hold."""
