"""HTTP: the ASGI app, its routes and endpoints, and the servers that run it."""
