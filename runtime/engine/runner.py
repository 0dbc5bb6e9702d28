"""How an engine computes: the runner protocol, the runner of a device, and the resources of
an engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.backends import Device, KVStorage, Program, Queue, Sampled, Ticket
from sagellm.runtime.engine.batch import Batch, step_batch
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.output_text import OutputText
from sagellm.runtime.engine.speculation import Speculation
from sagellm.runtime.kv.transport import Storage
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineFacts


class StepLaunch(Protocol):
    """A batch on its way."""

    @property
    def batch(self) -> Batch: ...

    async def result(self) -> Sampled:
        """Wait for what was sampled; raises what went wrong.

        Cancellation is delivered only once nothing writes the sequences' blocks any more.
        """
        ...

    def recall(self) -> bool:
        """Take it back; False where it has begun. Nobody waits for the result of one recalled."""
        ...


class Runner(Protocol):
    """One engine's way to compute. `async_scheduling`: a batch may be launched while the one before it
    computes; then it begins without the host.
    """

    @property
    def async_scheduling(self) -> bool: ...

    def launch(self, batch: Batch, after: StepLaunch | None = None) -> StepLaunch:
        """Compute keys and values of the batch's tokens, and sample.

        `after`: the launch before, which may sample some of those tokens; where it fails, a batch
        that needs its tokens fails too.
        """
        ...

    async def open(self) -> None:
        """Start what `launch` needs; `close` ends it, also when this was cancelled."""
        ...

    async def close(self) -> None:
        """Leave nothing running. Shielded from cancellation, and brief."""
        ...


class DeviceLaunch:
    """A ticket that a trio task can wait for."""

    def __init__(self, batch: Batch, ticket: Ticket) -> None:
        self.batch = batch
        self.ticket = ticket
        self._over = trio.Event()
        token = trio.lowlevel.current_trio_token()
        ticket.add_done_callback(lambda _: token.run_sync_soon(self._over.set))

    async def result(self) -> Sampled:
        """Shielded: a computation cannot be interrupted, and what it writes must not be freed
        before it ends. A cancellation is delivered afterwards.
        """
        with trio.CancelScope(shield=True):
            await self._over.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self.ticket.result()

    def recall(self) -> bool:
        return self.ticket.cancel()

    async def over(self) -> None:
        """Take it back, or wait until it is over, well or badly."""
        if not self.recall():
            await self._over.wait()


class DeviceQueue:
    """A queue of `device` between `open` and `close`; several programs may be launched on it."""

    def __init__(self, device: Device, threads: int | None = None) -> None:
        self._device = device
        self._threads = threads
        self._queue: Queue | None = None
        self._launches: list[DeviceLaunch] = []  # that may not be over

    def open(self) -> None:
        self._queue = self._device.open_queue(self._threads)

    async def close(self) -> None:
        for launch in reversed(self._launches):
            await launch.over()
        self._launches.clear()
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def launch(
        self, program: Program, storage: KVStorage, batch: Batch, after: StepLaunch | None
    ) -> DeviceLaunch:
        assert self._queue is not None, "the engine does not run"
        before = after if isinstance(after, DeviceLaunch) else None
        numbers = step_batch(
            batch, before.batch if before else None, before.ticket if before else None
        )
        launch = DeviceLaunch(batch, self._queue.launch(program, storage, numbers))
        self._launches = [one for one in self._launches if not one.ticket.done()]
        self._launches.append(launch)
        return launch


@dataclass(frozen=True, slots=True)
class DeviceRunner:
    """Launches one program on one pool; opens and closes the queue, which others may share."""

    queue: DeviceQueue
    program: Program
    storage: KVStorage
    async_scheduling: bool = True

    def launch(self, batch: Batch, after: StepLaunch | None = None) -> DeviceLaunch:
        return self.queue.launch(self.program, self.storage, batch, after)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()
        self.queue.open()

    async def close(self) -> None:
        await self.queue.close()


OpenOutputText: TypeAlias = Callable[[SequenceState], OutputText]


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What an engine works with. `open_output_text` is None where tokens have no text, `speculation`
    where no tokens are drafted.
    """

    facts: EngineFacts
    limits: Limits
    runner: Runner
    storage: Storage
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    open_output_text: OpenOutputText | None = None
    speculation: Speculation | None = None

    @property
    def async_scheduling(self) -> bool:
        """Whether a step may be scheduled while the one before it computes: drafts need to know
        what that samples.
        """
        return self.runner.async_scheduling and self.speculation is None
