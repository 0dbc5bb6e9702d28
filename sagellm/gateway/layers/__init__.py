"""What every call passes before its endpoint: one file a concern, on plain ASGI."""
