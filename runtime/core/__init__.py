"""The core: makes all decisions of a running graph, without I/O. Start reading at `core.py`."""
