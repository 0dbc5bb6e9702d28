"""Clients of any OpenAI-compatible server, and of a graph in this process."""
