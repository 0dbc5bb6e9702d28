"""Metrics: counters, histograms, and their exposition for Prometheus."""
