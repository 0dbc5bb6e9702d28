"""Gateways in processes of their own, and what links them to the process of the graph."""
