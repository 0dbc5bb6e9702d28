"""Worker processes: started, watched, restarted and ended by a supervisor."""


class WorkerUnfit(RuntimeError):
    """A worker that cannot open its engine, or dies before it has; the message says why."""


class NoResources(WorkerUnfit):
    """A worker that could not be started: no memory, no file, or too many processes."""


class CannotScale(ValueError):
    """An engine cannot have so many replicas; the message says why."""
