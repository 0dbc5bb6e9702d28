"""Whether an open graph makes progress, as one frozen record."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.runtime.engine.port import EngineHealth
from sagellm.runtime.executors.tasks import TasksExecutor


@dataclass(frozen=True, slots=True)
class Health:
    """`num_open`: choices without their last event. `engines`: by name, one record a replica."""

    num_open: int
    is_stopped: bool  # the graph has ended, or fallen over: it takes no request any more
    engines: Mapping[str, tuple[EngineHealth, ...]]

    @property
    def is_hung(self) -> bool:
        """Whether any replica has work and makes no progress."""
        return any(engine.is_hung for replicas in self.engines.values() for engine in replicas)


def health_of(executor: TasksExecutor) -> Health:
    engines = {
        name: tuple(engine.health for engine in replicas)
        for name, replicas in executor.engines.items()
    }
    return Health(executor.core.ledger.num_open, executor.is_stopped, engines)
