"""The core: all decisions that need no waiting. Start reading at `core.py`."""
