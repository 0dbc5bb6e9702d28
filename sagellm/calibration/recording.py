"""An engine of kind `local` that records its steps."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import trio

from sagellm.backends import Sampled
from sagellm.extensions import register_engine_kind
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.kinds import KINDS, EngineKind, ReplicaPlace, local
from sagellm.runtime.engine.kinds.local import open_resources
from sagellm.runtime.engine.kinds.modelled import shape_of
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import LOCAL_CAPABILITIES, EngineOptions
from sagellm.runtime.engine.runner import EngineResources, Runner, StepLaunch
from sagellm.runtime.engine.sizing import resized
from sagellm.runtime.engine.step_cost import StepShape
from sagellm.runtime.messages import ChoiceKey, SequenceState


class MeasuredStep(NamedTuple):
    """One step: its shape, its seconds, and when its result was there."""

    shape: StepShape
    seconds: float
    ended_s: float


@dataclass(slots=True)
class StepLog:
    """The steps of one engine, in order, and when each sequence entered the engine.

    A step begins with its launch; behind another step, with the end of that step. So the time of a
    step has what the host does between two steps.
    """

    steps: list[MeasuredStep] = field(default_factory=list)
    submitted_s: dict[ChoiceKey, float] = field(default_factory=dict)
    _ended_s: float = float("-inf")

    def record(self, batch: Batch, shape: StepShape, launched_s: float, ended_s: float) -> None:
        came_s = min(self._came(batch), default=launched_s)
        began_s = self._ended_s if came_s <= self._ended_s else launched_s
        self.steps.append(MeasuredStep(shape, ended_s - max(began_s, self._ended_s), ended_s))
        self._ended_s = ended_s

    def take(self) -> list[MeasuredStep]:
        """The steps since the last call."""
        steps, self.steps = self.steps, []
        return steps

    def step_before(self, at_s: float) -> MeasuredStep:
        """The last step that had ended at a time. Raises IndexError if there is none."""
        return self.steps[bisect_right(self.steps, at_s, key=lambda step: step.ended_s) - 1]

    def _came(self, batch: Batch) -> Iterable[float]:
        return (self.submitted_s[one.state.key] for one in batch.sequences)


@dataclass(frozen=True, slots=True)
class RecordingLaunch:
    """A launched batch, whose step is recorded when its result is there."""

    launch: StepLaunch
    shape: StepShape
    launched_s: float
    log: StepLog

    @property
    def batch(self) -> Batch:
        return self.launch.batch

    async def result(self) -> Sampled:
        sampled = await self.launch.result()
        self.log.record(self.batch, self.shape, self.launched_s, trio.current_time())
        return sampled

    def cancel(self) -> bool:
        return self.launch.cancel()


@dataclass(frozen=True, slots=True)
class RecordingRunner:
    """A runner that records the steps of another."""

    runner: Runner
    log: StepLog

    @property
    def async_scheduling(self) -> bool:
        return self.runner.async_scheduling

    def launch(self, batch: Batch, after: StepLaunch | None = None) -> RecordingLaunch:
        shape, launched_s = shape_of(batch), trio.current_time()
        before = after.launch if isinstance(after, RecordingLaunch) else after
        return RecordingLaunch(self.runner.launch(batch, before), shape, launched_s, self.log)

    async def open(self) -> None:
        await self.runner.open()

    async def close(self) -> None:
        await self.runner.close()


class RecordedEngine(LocalEngine):
    """A local engine with a log of its steps."""

    def __init__(self, resources: EngineResources, *, name: str, replica: int = 0) -> None:
        self.log = StepLog()
        self.limits = resources.limits
        runner = RecordingRunner(resources.runner, self.log)
        super().__init__(replace(resources, runner=runner), name=name, replica=replica)

    async def submit(self, state: SequenceState) -> None:
        self.log.submitted_s[state.key] = trio.current_time()
        await super().submit(state)


async def _open(options: EngineOptions, place: ReplicaPlace) -> RecordedEngine:
    return await trio.to_thread.run_sync(_load, options, place, abandon_on_cancel=place.may_abandon)


def _load(options: EngineOptions, place: ReplicaPlace) -> RecordedEngine:
    resources = open_resources(
        resized(options, place.num_blocks), replica=place.replica, progress=place.progress
    )
    return RecordedEngine(resources, name=place.engine, replica=place.replica)


RECORDED = "recorded"  # the name of the kind
_KIND = EngineKind(EngineOptions, LOCAL_CAPABILITIES, _open, local.KIND.describe)


@contextmanager
def recorded_kind() -> Iterator[None]:
    """During the block, `kind: recorded` means a local engine with a log of its steps."""
    register_engine_kind(RECORDED, _KIND)
    try:
        yield
    finally:
        KINDS.forget(RECORDED)
