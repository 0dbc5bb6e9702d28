"""Worker processes: started, watched, restarted and ended by a supervisor."""


class WorkerUnfit(RuntimeError):
    """A worker could not open its engine, or died before its engine was open. The message is the
    reason.
    """


class NoResources(WorkerUnfit):
    """A worker could not be started: no memory, no file descriptor, or too many processes."""


class CannotScale(ValueError):
    """An engine cannot have the requested number of replicas; the message is the reason."""
