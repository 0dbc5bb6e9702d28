"""The core: everything that decides without waiting. See `core.py`."""
