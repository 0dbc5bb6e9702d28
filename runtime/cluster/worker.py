"""The state of one worker, and the requests that may have caused deaths of workers."""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import trio

from sagellm.runtime.cluster.child_process import Restarts
from sagellm.runtime.engine.remote_engine import RemoteEngine

# starting -> ready -> dead -> starting ...; ready -> drained, until a restart. An ejected worker is
# not restarted for a while, because its link keeps failing. A failing worker has died too often; it
# is restarted after long pauses. A removed worker is never restarted unless it is added again.
WorkerState: TypeAlias = Literal[
    "starting", "ready", "drained", "dead", "ejected", "failing", "removed"
]


@dataclass(frozen=True, slots=True)
class Watch:
    """The intervals and timeouts with which a worker is watched, in seconds.

    The supervisor pings the worker every `ping_s`; any message from the worker is a sign of life. A
    worker without a sign of life for `silent_s` counts as dead, and is killed. A worker whose
    engine has hung for `hang_s` is killed, too; this time is long because a first or a large step
    may be slow. `start_s`: the most time to open the engine. `stop_s`: the most time from a stop
    message to the end.
    """

    ping_s: float = 0.25
    silent_s: float = 1.0
    hang_s: float = 30.0
    start_s: float = 600.0
    stop_s: float = 5.0


@dataclass(slots=True)
class Worker:
    """One replica of an engine, over all its lives."""

    engine_name: str
    replica: int
    restarts: Restarts
    state: WorkerState = "starting"
    pid: int | None = None
    epoch: int = 0
    engine: RemoteEngine | None = None
    why: str = ""  # why this life ended; while it runs, the reason if it ended now
    ended: str = ""  # why the previous life ended
    is_cut: bool = False  # this life ended because its link failed, as far as is known
    ejected_s: float = 0.0  # when the worker was last ejected
    is_to_drain: bool = False  # drain the worker as soon as it is ready
    is_leaving: bool = False  # this life was asked to end, so its end does not count as a death
    was_ready: bool = False  # a life has become ready since the worker was added
    has_served: bool = False  # a token came since a request was last blamed for a death
    life: trio.CancelScope | None = None  # of the current life; None: between two lives
    wake_up: trio.Event = field(default_factory=trio.Event)  # ends the pause before the next life
    gone: trio.Event = field(default_factory=trio.Event)  # the worker was removed, and has ended

    def __str__(self) -> str:
        return f"{self.engine_name}[{self.replica}]"

    @property
    def is_serving(self) -> bool:
        return self.state == "ready"

    @property
    def is_wanted(self) -> bool:
        return self.state != "removed"

    def reset(self) -> None:
        """Prepare a new or a removed worker for its first life: earlier deaths do not count."""
        self.state, self.was_ready = "starting", False
        self.is_leaving = self.is_to_drain = False
        self.gone = trio.Event()
        self.restarts.reset_backoff()
        if self.engine is not None:
            self.engine.is_removed = False

    def end_life(self) -> None:
        """End this life with a stop message, or end the pause before the next life."""
        self.wake_up.set()
        if self.life is not None:
            self.is_leaving = True
            self.life.cancel()


Key: TypeAlias = tuple[str, int]  # the id of a request, and a choice

_MAX_DEATHS = 64  # the deaths that are remembered


class Suspects:
    """Remembers, for the latest deaths, the requests in the dead worker that had no token from it.

    A request that was in two deaths counts as the cause of the second death. `Recovery` quarantines
    the request by the same rule.
    """

    def __init__(self) -> None:
        self._deaths: deque[Set[Key]] = deque(maxlen=_MAX_DEATHS)

    def died(self, unserved: Set[Key]) -> bool:
        """Record a death. Returns whether one of the requests `unserved` is the cause.

        `unserved`: the requests in the worker that had no token from it.
        """
        is_known = any(not unserved.isdisjoint(earlier) for earlier in self._deaths)
        if unserved:
            self._deaths.append(unserved)
        return is_known
