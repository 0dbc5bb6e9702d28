"""Launchers of workers: as processes on this machine, with spares, or as tasks in this loop."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Protocol

import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.cluster.child_process import ChildProcess
from sagellm.runtime.cluster.control import SocketFolder
from sagellm.runtime.cluster.executor_options import IPC
from sagellm.runtime.cluster.worker_main import OpenEngine, WorkerStart, spare_env, work
from sagellm.runtime.comm.channel import Channel, ChannelClosed, MemoryChannel, memory_channels
from sagellm.runtime.comm.keys import load_keys
from sagellm.runtime.comm.zeromq import Hub


class Life(Protocol):
    """One run of a worker, from its start to its end. `channel` is the link to the worker."""

    @property
    def pid(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    async def wait(self) -> int:
        """Wait for the end. Returns the exit code, negative for a signal."""

    def kill(self) -> None:
        """End the life at once. Safe to call after its end."""

    def close(self) -> None:
        """Free the resources of a life that has ended. Messages that are left are dropped."""


class Launcher(Protocol):
    """Starts lives of workers. `launch` may be called only while `run` runs."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def launch(self, epoch: int) -> Life:
        """Start life number `epoch` of a worker. Raises OSError."""


class ProcessLife:
    """A life in a process on this machine. Implements Life."""

    def __init__(self, process: ChildProcess, channel: Channel) -> None:
        self._process = process
        self.channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.close()
        self.channel.close()


class ProcessLauncher:
    """Starts workers as processes. Each runs `module`, which calls `worker_main.serve`. Implements
    Launcher.

    `address`: where workers connect to. It is a tcp address, for which `keys` names a folder of
    keys, or `ipc`: a socket in a folder that only this user can access. `env` is added to the
    environment of workers. Raises BadKeys.

    `num_spares` spare processes are kept ready for engines on `devices`; they replace workers that
    die.
    """

    def __init__(
        self,
        module: str,
        address: str = IPC,
        keys: str | None = None,
        env: Mapping[str, str] = MappingProxyType({}),
        num_spares: int = 0,
        devices: Sequence[str] = (),
    ) -> None:
        hub_keys = load_keys(Path(keys), "graph") if keys is not None else None
        self._folder = SocketFolder()
        self.folder = self._folder.path
        self._module = module
        self._keys = keys
        self._env = env
        self._hub = Hub(hub_keys)
        spare = {**env, **spare_env(devices)}
        self._spares = Spares(lambda: ChildProcess(module, spare), num_spares)
        self._endpoint = f"ipc://{self.folder}/hub" if address == IPC else address

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            self._endpoint = self._hub.bind(self._endpoint)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._spares.run)
                task_status.started()
                await self._hub.run()
        finally:
            self._folder.remove()

    def launch(self, epoch: int) -> ProcessLife:
        name = secrets.token_bytes(16)
        # trio's clock minus `perf_counter`, a clock that all processes of this machine share.
        offset_s = trio.current_time() - perf_counter()
        start = WorkerStart(
            self._next_endpoint(),
            name.hex(),
            epoch,
            offset_s,
            folder=str(self.folder),
            keys=self._keys,
        )
        self._spares.postpone()
        # Spares are kept for replacements: the first life of a worker uses a new process.
        process = self._spares.take(start.line) if epoch > 1 else None
        process = process or ChildProcess(self._module, {**self._env, **start.env})
        return ProcessLife(process, self._hub.link(name, epoch))

    def _next_endpoint(self) -> str:
        """The endpoint that the next worker connects to. Tests with a relay override this."""
        return self._endpoint


class TaskLife:
    """A life in a task of this event loop. Implements Life."""

    def __init__(self, pid: int, channel: MemoryChannel) -> None:
        self.pid = pid
        self.channel = channel
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._code = 0

    async def live(self, channel: MemoryChannel, open_engine: OpenEngine) -> None:
        """Run the worker until a stop message or a kill."""
        try:
            with self._scope, suppress(ChannelClosed):
                await work(channel, open_engine, ())
        finally:
            channel.close()
            self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return self._code

    def kill(self) -> None:
        if not self._ended.is_set():
            self._code = -9  # the code of a process that SIGKILL ended
            self._scope.cancel()

    def close(self) -> None:
        self.channel.close()


class TaskLauncher:
    """Starts workers as tasks, linked by memory channels, for tests in virtual time. Implements
    Launcher.
    """

    def __init__(self, open_engine: OpenEngine) -> None:
        self._open_engine = open_engine
        self._nursery: trio.Nursery | None = None
        self._num_launched = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def launch(self, epoch: int) -> TaskLife:
        assert self._nursery is not None
        self._num_launched += 1
        here, there = memory_channels()
        life = TaskLife(self._num_launched, here)
        self._nursery.start_soon(life.live, there, self._open_engine)
        return life


log = get_logger("sagellm.cluster")

# The time from the last start of a worker to the start of a spare, which must not compete with the
# worker for the CPU.
QUIET_S = 5.0
_LOOK_S = 60.0  # between two checks for dead spares


class Spares:
    """Keeps `count` spare worker processes while `run` runs. `start` creates a spare.

    A spare has imported a worker's modules, and waits for its start. It replaces a dead worker a
    second or two earlier than a new process. It also takes no CPU time for imports while other
    workers serve the requests of the dead worker.
    """

    def __init__(self, start: Callable[[], ChildProcess], count: int) -> None:
        self._start = start
        self._count = count
        self._waiting: list[ChildProcess] = []
        self._changed = trio.Event()

    def postpone(self) -> None:
        """Delay the next spare, because a worker starts now."""
        self._changed.set()

    def take(self, part: bytes) -> ChildProcess | None:
        """Send a waiting spare its start line `part`, and return its process. None: no spare
        waits.
        """
        while self._waiting:
            process = self._waiting.pop()
            try:
                process.tell(part)
            except OSError:  # the spare has died
                process.kill()
                process.close()
            else:
                return process
        return None

    async def run(self) -> None:
        """Keep spares until cancelled, and then end all of them."""
        try:
            while self._count:
                await self._quiet()
                self._fill()
                with trio.move_on_after(_LOOK_S):
                    await self._changed.wait()
        finally:
            with trio.CancelScope(shield=True):
                for process in self._waiting:
                    process.kill()
                    await process.wait()
                    process.close()

    async def _quiet(self) -> None:
        """Wait until no worker has started for `QUIET_S`."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_after(QUIET_S) as waiting:
                await self._changed.wait()
            if waiting.cancelled_caught:
                return

    def _fill(self) -> None:
        for process in [one for one in self._waiting if one.has_ended]:
            self._waiting.remove(process)
            process.close()
        try:
            while len(self._waiting) < self._count:
                self._waiting.append(self._start())
        except OSError as error:  # a dead worker is then replaced by a new process
            log.warning("spare_not_started", error=error.strerror)
