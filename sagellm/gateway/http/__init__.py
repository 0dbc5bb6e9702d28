"""HTTP: the app, its routes and endpoints, and the servers that it runs under."""
