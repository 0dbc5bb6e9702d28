"""Autoscaling with worker processes: carries out the effects `ScaleTo` of a core."""

from collections.abc import Mapping
from typing import Protocol

import trio

from sagellm.graphs.log import get_logger
from sagellm.graphs.sections import ReplicaBounds
from sagellm.runtime.cluster import CannotScale, WorkerUnfit
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.core.effects import ScaleTo

log = get_logger("sagellm.cluster")


class EndsScaling(Protocol):
    """An executor that wants to know when a change of the number of replicas has ended."""

    def end_scaling(self, engine: str, error: str = "") -> None: ...


class Autoscaling:
    """Starts and drains workers of a supervisor, as the operators of an executor decide.

    `begin` may be called only while `run` runs. `bounds`: of the engines that may be scaled.
    """

    def __init__(
        self, supervisor: Supervisor, executor: EndsScaling, bounds: Mapping[str, ReplicaBounds]
    ) -> None:
        self._supervisor = supervisor
        self._executor = executor
        self._bounds = bounds
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out changes until cancelled. Changes of one engine are made one after the other."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def begin(self, effect: ScaleTo) -> None:
        """Begin a change. Its end is reported to the executor."""
        assert self._nursery is not None
        self._nursery.start_soon(self._scale, effect)

    async def _scale(self, effect: ScaleTo) -> None:
        engine, error = effect.engine, ""
        bounds = self._bounds.get(engine)
        try:
            await self._supervisor.scale(
                engine, effect.num_replicas, drain_s=bounds.drain_s if bounds else 0.0
            )
        except (CannotScale, WorkerUnfit) as failure:
            error = str(failure)
            log.warning("autoscaling_failed", engine=engine, error=error)
        self._executor.end_scaling(engine, error)
