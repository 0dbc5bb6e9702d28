"""The options of each executor, as `executor:` of a graph file gives them."""

from dataclasses import dataclass, field

from sagellm.graphs.vocabulary import NoOptions


@dataclass(frozen=True, slots=True)
class ProcessesOptions:
    """How the workers of executor `processes` are watched, in seconds.

    Each is asked every `ping_s` for a sign of life, and counts as dead `silent_s` after its last,
    at least twice `ping_s`; or once its engine has been hung for `hang_s`. `max_hold_s`: how long a
    request waits for an engine of which no replica is there.
    """

    ping_s: float = field(default=0.25, metadata={"min": 1e-3})
    silent_s: float = field(default=1.0, metadata={"min": 1e-3})
    hang_s: float = field(default=30.0, metadata={"min": 1e-3})
    max_hold_s: float = field(default=30.0, metadata={"min": 0.0})


EXECUTORS = {"tasks": NoOptions, "processes": ProcessesOptions}
