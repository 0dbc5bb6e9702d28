"""Executors: how the operators of one stream graph are run."""
