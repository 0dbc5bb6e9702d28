"""Uploaded files, and batches of requests that are worked through in the background."""
