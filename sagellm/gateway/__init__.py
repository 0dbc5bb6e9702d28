"""The gateway: an OpenAI-compatible HTTP server that serves an open graph."""
