"""Gateways that run in the background: their records, their processes and their log files."""
