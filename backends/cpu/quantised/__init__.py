"""Quantised weights on the CPU: making them, and multiplying by them."""
