"""Executors: they run the operators of a stream graph."""
