"""Links between processes: frames, channels, keys and messages."""


class BadKeys(ValueError):
    """A key file is missing, broken, or readable by other users. The message names the file, and
    the fix.
    """
