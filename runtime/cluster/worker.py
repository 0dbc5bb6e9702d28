"""The state of one worker, and the requests that are suspected of deaths."""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import trio

from sagellm.runtime.cluster.child_process import Restarts
from sagellm.runtime.engine.remote_engine import RemoteEngine

# starting -> ready -> dead -> starting ...; ready -> drained, until a restart. An ejected worker is
# dead for a while because its link fails; a failing worker, because it has died too often. A
# removed worker is not wanted any more.
WorkerState: TypeAlias = Literal[
    "starting", "ready", "drained", "dead", "ejected", "failing", "removed"
]


@dataclass(frozen=True, slots=True)
class Watch:
    """How a worker is watched, in seconds.

    The supervisor asks every `ping_s` for a sign of life; any message is one. A worker without a
    sign for `silent_s` counts as dead, and is killed. So is a worker whose engine has hung for
    `hang_s`, which is long because a first or a large step may take a while. `start_s`: the most
    time to load. `stop_s`: the most time to stop.
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
    why: str = ""  # this life ended, or would end if it ended now
    ended: str = ""  # why the last life ended
    is_cut: bool = False  # the link ended this life, as far as can be known
    ejected_s: float = 0.0  # when the worker was last ejected
    is_to_drain: bool = False  # when it becomes ready
    is_leaving: bool = False  # this life was asked to end: that is no death
    was_ready: bool = False  # since it was last wanted
    has_served: bool = False  # emitted a token since a request was last to blame for a death
    life: trio.CancelScope | None = None
    wake_up: trio.Event = field(default_factory=trio.Event)  # ends the pause before the next life
    gone: trio.Event = field(default_factory=trio.Event)  # it was removed, and has ended

    def __str__(self) -> str:
        return f"{self.engine_name}[{self.replica}]"

    @property
    def is_serving(self) -> bool:
        return self.state == "ready"

    @property
    def is_wanted(self) -> bool:
        return self.state != "removed"

    def reset(self) -> None:
        """Start over with a worker that is new or was removed: earlier deaths do not count."""
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


Key: TypeAlias = tuple[str, int]  # a request's id and a choice

_MAX_DEATHS = 64  # remembered


class Suspects:
    """The requests that had no token yet from a worker when it died, for the last deaths.

    A request that was in two deaths counts as the cause of the second. `Recovery` quarantines the
    request by the same rule.
    """

    def __init__(self) -> None:
        self._deaths: deque[Set[Key]] = deque(maxlen=_MAX_DEATHS)

    def died(self, unserved: Set[Key]) -> bool:
        """Record a death with those requests in the worker; whether one of them is to blame."""
        is_known = any(not unserved.isdisjoint(earlier) for earlier in self._deaths)
        if unserved:
            self._deaths.append(unserved)
        return is_known
