"""Worker processes: started, watched, restarted and ended by a supervisor."""


class WorkerUnfit(RuntimeError):
    """A worker that cannot open its engine, or dies before that; the message says why."""


class NoResources(WorkerUnfit):
    """A worker that could not be started: no memory, no file descriptor, or too many processes."""


class CannotScale(ValueError):
    """An engine that cannot have so many replicas; the message says why."""
