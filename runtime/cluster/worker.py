"""What a supervisor knows of one worker, and how it watches it."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import trio

from sagellm.runtime.cluster.backoff import Restarts
from sagellm.runtime.engine.remote import RemoteEngine

# starting -> ready -> dead -> starting ...; ready -> drained, until restarted; failed: given up
WorkerState: TypeAlias = Literal["starting", "ready", "drained", "dead", "failed"]


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
    why: str = ""  # the last life ended
    is_leaving: bool = False  # this life was asked to end: no death
    life: trio.CancelScope | None = None
    stirred: trio.Event = field(default_factory=trio.Event)  # somebody wants it back now

    def __str__(self) -> str:
        return f"{self.engine_name}[{self.replica}]"

    @property
    def is_serving(self) -> bool:
        return self.state == "ready"

    def leave(self) -> None:
        """End this life, in order, or the wait for the next one."""
        self.stirred.set()
        if self.life is not None:
            self.is_leaving = True
            self.life.cancel()
