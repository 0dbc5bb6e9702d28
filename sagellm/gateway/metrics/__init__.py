"""What the gateway tells of itself: counters, histograms and their Prometheus exposition."""
