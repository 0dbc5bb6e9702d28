"""Calibration: measures the steps of a real engine, and fits a cost model to them."""
