"""Executors: how the operators of a stream graph are run."""
