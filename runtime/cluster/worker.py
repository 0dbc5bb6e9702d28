"""The state of one worker, and which requests are suspected of its deaths."""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import trio

from sagellm.runtime.cluster.child_process import Restarts
from sagellm.runtime.engine.remote_engine import RemoteEngine

# starting -> ready -> dead -> starting ...; ready -> drained, until restarted; ejected: dead for a
# while, as its link fails; failing: dead for a while, as it has died too often of late; removed:
# not wanted any more
WorkerState: TypeAlias = Literal[
    "starting", "ready", "drained", "dead", "ejected", "failing", "removed"
]


@dataclass(frozen=True, slots=True)
class Watch:
    """How a worker is watched, in seconds.

    It is asked every `ping_s` for a sign of life; any message is one. Without one for `silent_s` it
    counts as dead, and is killed: so is one whose engine has been hung for `hang_s`, for a first or
    a long step may take a while. Loading may take `start_s`, ending `stop_s`.
    """

    ping_s: float = 0.25
    silent_s: float = 1.0
    hang_s: float = 30.0
    start_s: float = 600.0
    stop_s: float = 5.0


@dataclass(slots=True)
class Worker:
    """One replica of an engine, through all its lives."""

    engine_name: str
    replica: int
    restarts: Restarts
    state: WorkerState = "starting"
    pid: int | None = None
    epoch: int = 0
    engine: RemoteEngine | None = None
    why: str = ""  # this life ended, or would end if it did now
    ended: str = ""  # why the last life did
    is_cut: bool = False  # by its link, as far as can be known
    ejected_s: float = 0.0  # when it was the last time
    is_to_drain: bool = False  # as soon as it is ready
    is_leaving: bool = False  # this life was asked to end: no death
    was_ready: bool = False  # since it was last wanted
    has_served: bool = False  # a token, since a request was last to blame for its death
    life: trio.CancelScope | None = None
    wake_up: trio.Event = field(default_factory=trio.Event)  # somebody wants it back now
    gone: trio.Event = field(default_factory=trio.Event)  # it was removed, and has ended

    def __str__(self) -> str:
        return f"{self.engine_name}[{self.replica}]"

    @property
    def is_serving(self) -> bool:
        return self.state == "ready"

    @property
    def is_wanted(self) -> bool:
        return self.state != "removed"

    def want(self) -> None:
        """It was removed, or is new: begin again as if nothing had been."""
        self.state, self.was_ready = "starting", False
        self.is_leaving = self.is_to_drain = False
        self.gone = trio.Event()
        self.restarts.reset_backoff()
        if self.engine is not None:
            self.engine.is_removed = False

    def leave(self) -> None:
        """End this life, in order, or the wait for the next one."""
        self.wake_up.set()
        if self.life is not None:
            self.is_leaving = True
            self.life.cancel()


Key: TypeAlias = tuple[str, int]  # a request's id and a choice

_MAX_DEATHS = 64  # that are remembered


class Suspects:
    """The requests that had no token yet from a worker as it died, death after death.

    A request that was in two of them is taken for the cause of the second, as `Recovery` takes it
    when it quarantines the request.
    """

    def __init__(self) -> None:
        self._deaths: deque[Set[Key]] = deque(maxlen=_MAX_DEATHS)

    def died(self, unserved: Set[Key]) -> bool:
        """A worker died with those requests in it; whether one of them is to blame."""
        is_known = any(not unserved.isdisjoint(earlier) for earlier in self._deaths)
        if unserved:
            self._deaths.append(unserved)
        return is_known
