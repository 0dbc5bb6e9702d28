"""Experiments on traffic, from decision logs: A/B tests, and what shadows would have changed."""
