"""From a graph's name to an open session: its file, options, checks, engines and workers."""
