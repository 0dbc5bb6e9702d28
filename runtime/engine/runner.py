"""Runners compute the batches of an engine; a watchdog measures their steps."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.backends import Device, KVStorage, Program, Queue, Sampled, Ticket
from sagellm.runtime.containers import LogHistogram
from sagellm.runtime.engine.batch import Batch, step_batch
from sagellm.runtime.engine.grammar_queue import LateCompiler
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.output import OutputText
from sagellm.runtime.engine.speculation import Speculation
from sagellm.runtime.kv.transport import Storage
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.port import EngineFacts, EngineHealth


class StepLaunch(Protocol):
    """A launched batch."""

    @property
    def batch(self) -> Batch: ...

    async def result(self) -> Sampled:
        """Wait until the batch is computed, and return what was sampled. Raises the error of a
        failed batch.

        A cancellation is delivered only after the device has stopped writing the sequences' blocks.
        """
        ...

    def cancel(self) -> bool:
        """Cancel the batch unless it has begun. Return whether it is cancelled. A cancelled launch
        has no result.
        """
        ...


class Runner(Protocol):
    """Computes the batches of one engine. `async_scheduling`: whether a batch may be launched while
    the previous batch computes, and then begins without the host.
    """

    @property
    def async_scheduling(self) -> bool: ...

    def launch(self, batch: Batch, after: StepLaunch | None = None) -> StepLaunch:
        """Compute keys and values of the batch's tokens, and sample.

        `after`: the previous launch, which may sample some tokens of the batch. If it fails, a
        batch that needs its tokens fails too.
        """
        ...

    async def open(self) -> None:
        """Start the queue or thread that `launch` needs. The caller must call `close`, even if
        `open` is cancelled.
        """
        ...

    async def close(self) -> None:
        """End all launches and threads. Called under a shield, so it must be brief."""
        ...


class Wakeup:
    """Wakes one trio task from the threads of a device."""

    def __init__(self) -> None:
        self._readable, self._writable = os.pipe()
        for end in (self._readable, self._writable):
            os.set_blocking(end, False)
        # PyDLL keeps Python's lock. A call that releases the lock gives it to the task, and the
        # thread of the device must wait for it before it begins the next launch.
        self._write = ctypes.PyDLL(None).write
        self._write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)

    def wake(self) -> None:
        self._write(self._writable, b"\0", 1)  # a full pipe wakes the task too

    async def wait(self) -> None:
        """Wait for a `wake` since the last wait. It may have been for an earlier event."""
        await trio.lowlevel.wait_readable(self._readable)
        os.read(self._readable, 4096)

    def close(self) -> None:
        """Close the pipe. No thread may call `wake` afterwards."""
        os.close(self._readable)
        os.close(self._writable)


class DeviceLaunch:
    """A launched batch, whose ticket a trio task can await. All launches of a queue are awaited by
    one task, which `wakeup` wakes.
    """

    def __init__(self, batch: Batch, ticket: Ticket, wakeup: Wakeup) -> None:
        self.batch = batch
        self.ticket = ticket
        self._wakeup = wakeup
        ticket.add_done_callback(lambda _: wakeup.wake())

    async def result(self) -> Sampled:
        # Shielded: a computation cannot be interrupted, and blocks that it writes must not be freed
        # before it ends.
        with trio.CancelScope(shield=True):
            await self._wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self.ticket.result()

    def cancel(self) -> bool:
        return self.ticket.cancel()

    async def over(self) -> None:
        """Cancel the batch, or wait until it is computed or has failed."""
        if not self.cancel():
            await self._wait()

    async def _wait(self) -> None:
        if self.ticket.done():
            await trio.lowlevel.checkpoint()  # other tasks run, however fast the device is
        while not self.ticket.done():
            await self._wakeup.wait()


class DeviceQueue:
    """A queue of `device`, which exists between `open` and `close`. Several programs may share it:
    a draft model runs on the queue of the model that it drafts for.
    """

    def __init__(self, device: Device, threads: int | None = None) -> None:
        self._device = device
        self._threads = threads
        self._queue: Queue | None = None
        self._wakeup: Wakeup | None = None  # exists as long as the queue
        self._launches: list[DeviceLaunch] = []  # launches that may still compute

    def open(self) -> None:
        self._queue = self._device.open_queue(self._threads)
        self._wakeup = Wakeup()

    async def close(self) -> None:
        for launch in reversed(self._launches):
            await launch.over()
        self._launches.clear()
        if self._queue is not None:
            self._queue.close()  # its threads have ended
            self._queue = None
        if self._wakeup is not None:
            self._wakeup.close()
            self._wakeup = None

    def launch(
        self, program: Program, storage: KVStorage, batch: Batch, after: StepLaunch | None
    ) -> DeviceLaunch:
        assert self._queue is not None, "the engine does not run"
        assert self._wakeup is not None
        previous = after if isinstance(after, DeviceLaunch) else None
        numbers = step_batch(
            batch, previous.batch if previous else None, previous.ticket if previous else None
        )
        ticket = self._queue.launch(program, storage, numbers)
        launch = DeviceLaunch(batch, ticket, self._wakeup)
        self._launches = [one for one in self._launches if not one.ticket.done()]
        self._launches.append(launch)
        return launch


@dataclass(frozen=True, slots=True)
class DeviceRunner:
    """Launches one program on one pool. It opens and closes the queue, which other runners may
    share.
    """

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
    """The parts that an engine is built from. `open_output_text` is None if tokens have no text.
    `speculation` is None if no tokens are drafted, `grammars` if answers follow no grammar.
    """

    facts: EngineFacts
    limits: Limits
    runner: Runner
    storage: Storage
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    open_output_text: OpenOutputText | None = None
    speculation: Speculation | None = None
    grammars: LateCompiler | None = None

    @property
    def async_scheduling(self) -> bool:
        """Whether the next step may be scheduled while a step computes. Speculation excludes this,
        because drafts continue the tokens that the step samples.
        """
        return self.runner.async_scheduling and self.speculation is None


_LEAST_S = 4.5  # without progress until an engine counts as hung, so that /ready fails within 5 s
_NUM_STEPS = 20.0  # an engine may be silent for as long as this many of its slowest steps


class Watchdog:
    """Detects that an engine hangs, from the times of its steps. The engine passes the times, in
    seconds of its clock.
    """

    def __init__(self) -> None:
        self._step_times = LogHistogram()
        self._started_s: float | None = None
        self._progressed_s = 0.0

    def start_step(self, now: float) -> None:
        self._started_s = now

    def finish_step(self, now: float) -> None:
        """Record that the current step has ended, or failed."""
        assert self._started_s is not None
        self._step_times = self._step_times.with_sample(now - self._started_s)
        self._started_s = None
        self._progressed_s = now

    def reset(self, now: float) -> None:
        """Restart the timeout, because the engine can advance only now: work came, or a reader made
        room.

        An engine that cannot advance does not hang.
        """
        self._progressed_s = now

    def health(self, now: float, *, has_work: bool) -> EngineHealth:
        """The health at `now`. `has_work`: whether some sequence can advance."""
        slowest_s = self._step_times.quantile(0.99)
        timeout_s = max(_LEAST_S, _NUM_STEPS * (slowest_s or 0.0))
        started_s = self._started_s
        return EngineHealth(
            busy_for_s=0.0 if started_s is None else now - started_s,
            step_p99_s=slowest_s,
            num_steps=self._step_times.num_samples,
            is_hung=(has_work or started_s is not None) and now - self._progressed_s > timeout_s,
        )
