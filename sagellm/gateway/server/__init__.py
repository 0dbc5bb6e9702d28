"""The two servers that the app runs under, their sockets, and how they stop."""
