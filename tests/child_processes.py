"""Child processes that a test started, without those that other tests left to this process."""

import psutil


def children() -> set[psutil.Process]:
    """The child processes of this process, such as the resource tracker of `multiprocessing`."""
    return set(psutil.Process().children())
