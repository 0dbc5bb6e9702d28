"""The runner of a device: its queue, while an engine runs, and the launches on it."""

from dataclasses import dataclass

import trio

from sagellm.backends import Device, KVStorage, Program, Queue, Sampled, Ticket
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import Launch
from sagellm.runtime.engine.step_batch import step_batch


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
        self, program: Program, storage: KVStorage, batch: Batch, after: Launch | None
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
    runs_ahead: bool = True

    def launch(self, batch: Batch, after: Launch | None = None) -> DeviceLaunch:
        return self.queue.launch(self.program, self.storage, batch, after)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()
        self.queue.open()

    async def close(self) -> None:
        await self.queue.close()
