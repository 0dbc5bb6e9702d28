"""Gateway processes, which serve HTTP outside the graph's process, and their links to it."""
