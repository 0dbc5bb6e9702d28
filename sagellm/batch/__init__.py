"""Answering a file of prompts: JSON lines in, JSON lines out, resumable."""
