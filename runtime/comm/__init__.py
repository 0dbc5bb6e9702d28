"""Links between processes: frames, channels, keys and messages."""


class BadKeys(ValueError):
    """Keys that are not there, or not to be trusted; the message says which, and how to fix it."""
