"""Opens a graph: finds its file, sets options, checks it, starts its engines or workers."""
