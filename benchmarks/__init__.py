"""Measurements against other engines and the machine's limits; run from the repository."""
