"""Clients of any OpenAI-compatible server, and of a graph opened in this process."""
