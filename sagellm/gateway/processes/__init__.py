"""Gateways in processes of their own, and their links to the process of the graph."""
