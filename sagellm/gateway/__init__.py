"""The gateway: an OpenAI-compatible HTTP server before any graph."""
