"""Links between processes: frames, channels, keys and messages."""


class BadKeys(ValueError):
    """Keys that are missing, or not to be trusted; the message names them, and how to fix it."""
