"""Whether an open graph makes progress, as one frozen record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.port import EngineHealth

if TYPE_CHECKING:
    from sagellm.runtime.cluster.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Health:
    """`num_open`: choices without their last event. `engines`: by name, one record a replica.

    `missing`: which engines that requests cannot do without have no worker that serves, in words;
    empty where each has one.
    """

    num_open: int
    is_stopped: bool  # the graph has ended, or fallen over: it takes no request any more
    engines: Mapping[str, tuple[EngineHealth, ...]]
    missing: str = ""

    @property
    def is_hung(self) -> bool:
        """Whether any replica has work and makes no progress."""
        return any(engine.is_hung for replicas in self.engines.values() for engine in replicas)


def health_of(executor: TasksExecutor, supervisor: "Supervisor | None" = None) -> Health:
    engines = {
        name: tuple(engine.health for engine in replicas)
        for name, replicas in executor.engines.items()
    }
    plan, found = executor.core.plan, supervisor.missing if supervisor is not None else {}
    missing = "; ".join(why for name, why in found.items() if not plan.can_avoid(name))
    return Health(executor.core.ledger.num_open, executor.is_stopped, engines, missing)
