"""Processes of a graph: how they are started, watched, restarted and ended."""
