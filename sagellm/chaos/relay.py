"""Faults between a graph and its workers: relays that disturb links, and damaged KV transfers.

Worker processes of a scenario run this module as their main module.
"""

import importlib
import math
import os
import random
import socket
import struct
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import trio

from sagellm.backends.interface import RunPairs
from sagellm.graphs.log import get_logger
from sagellm.logs import logs_environment
from sagellm.opening import worker_main
from sagellm.runtime.cluster.executor_options import ProcessesOptions
from sagellm.runtime.cluster.launch import ProcessLauncher, ProcessLife

log = get_logger("sagellm.chaos")

_ROOM = 256  # most chunks in flight in one direction
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST and drops unsent data


@dataclass(slots=True)
class LinkFaults:
    """The current faults of one link. The player changes them while the relay runs.

    `is_cut`: hold all data back, without losing any. `num_to_flip`: flip one bit in each of the
    next `num_to_flip` chunks. `scenario.Toxic` describes the other fields.
    """

    is_cut: bool = False
    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    chunk_bytes: int = 65_536
    reset_every: int | None = None
    flip: float = 0.0
    num_to_flip: int = 0


@dataclass(slots=True)
class Relay:
    """Accepts a worker's connections, and relays each over a new connection to `address`."""

    listening: socket.socket
    family: socket.AddressFamily
    address: str | tuple[str, int]
    draw: random.Random
    faults: LinkFaults = field(default_factory=LinkFaults)
    num_resets: int = 0
    num_flipped: int = 0
    _num_passed: int = 0

    async def run(self) -> None:
        """Relay until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self.listening))
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, worker: trio.SocketStream) -> None:
        async with worker:
            try:
                with trio.socket.socket(self.family, socket.SOCK_STREAM) as onward:
                    await onward.connect(self.address)
                    await self._relay(worker, trio.SocketStream(onward))
            except OSError as error:  # no free descriptor, or no listener: the worker tries again
                log.warning("not_relayed", error=error.strerror)

    async def _relay(self, worker: trio.SocketStream, graph: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            for source, sink in ((worker, graph), (graph, worker)):
                put, take = trio.open_memory_channel[tuple[float, bytes]](_ROOM)
                nursery.start_soon(self._read, source, put)
                nursery.start_soon(self._write, take, sink, nursery.cancel_scope)

    async def _read(
        self, source: trio.SocketStream, put: "trio.MemorySendChannel[tuple[float, bytes]]"
    ) -> None:
        async with put:
            try:
                while data := await source.receive_some(self.faults.chunk_bytes):
                    await put.send((trio.current_time() + self.faults.delay_s, bytes(data)))
            except trio.BrokenResourceError:
                pass  # the connection was reset

    async def _write(
        self,
        take: "trio.MemoryReceiveChannel[tuple[float, bytes]]",
        sink: trio.SocketStream,
        scope: trio.CancelScope,
    ) -> None:
        async with take:
            async for due_s, data in take:
                await trio.sleep_until(max(due_s, trio.current_time()))
                while self.faults.is_cut:  # noqa: ASYNC110 - a plain flag, set by the player
                    await trio.sleep(0.01)
                if not math.isinf(self.faults.bytes_per_s):
                    await trio.sleep(len(data) / self.faults.bytes_per_s)
                self._num_passed += 1
                if self.faults.reset_every and self._num_passed % self.faults.reset_every == 0:
                    self.num_resets += 1
                    sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    break
                try:
                    await sink.send_all(self._flipped(data))
                except trio.BrokenResourceError:
                    break
        scope.cancel()  # one direction has ended: close the other one, too

    def _flipped(self, data: bytes) -> bytes:
        if self.faults.num_to_flip:
            self.faults.num_to_flip -= 1
        elif self.draw.random() >= self.faults.flip:
            return data
        self.num_flipped += 1
        changed = bytearray(data)
        changed[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        return bytes(changed)


CHAOS_WORKER_MODULE = "sagellm.chaos.relay"


class RelayedProcesses(ProcessLauncher):
    """Starts worker processes, each with a relay on its link. `relays`: pid -> relay."""

    def __init__(self, options: ProcessesOptions, seed: int = 0) -> None:
        super().__init__(CHAOS_WORKER_MODULE, options.address, options.keys, logs_environment())
        self.relays: dict[int, Relay] = {}
        self._draw = random.Random(seed)
        self._numbers = count()
        self._nursery: trio.Nursery | None = None
        self._next: Relay | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            await super().run(task_status)

    def launch(self, epoch: int) -> ProcessLife:
        life = super().launch(epoch)  # calls `_next_endpoint`, which makes the process's relay
        assert self._next is not None
        self.relays[life.pid] = self._next
        return life

    def _next_endpoint(self) -> str:
        assert self._nursery is not None
        scheme, _, place = self._endpoint.partition("://")
        if scheme == "ipc":
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            relay_address = f"{self.folder}/relay-{next(self._numbers)}"
            listening.bind(relay_address)
            address: str | tuple[str, int] = place
        else:
            host, port = place.rsplit(":", 1)
            listening = socket.create_server(("127.0.0.1", 0))
            relay_address = f"127.0.0.1:{listening.getsockname()[1]}"
            address = (host.strip("[]"), int(port))
        listening.listen()
        listening.setblocking(False)
        self._next = Relay(listening, socket.AddressFamily(_family(address)), address, self._draw)
        self._nursery.start_soon(self._next.run)
        return f"{scheme}://{relay_address}"


def _family(address: str | tuple[str, int]) -> int:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


KV_DAMAGE_VARIABLE = "SAGELLM_CHAOS_KV_DAMAGE"
_STORAGE = (
    "sagellm.backends.cpu.kv_storage"  # imported on demand: the graph's process needs no torch
)


def damage_kv_transfers(share: float) -> None:
    """Flip one bit in a share of the KV chunks that this process receives after this call."""
    storage: Any = importlib.import_module(_STORAGE).CpuStorage
    draw, receive = random.Random(os.getpid()), storage.receive

    def receive_and_flip(self: Any, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        found: int = receive(self, memory, pairs, layers)
        if draw.random() >= share:
            return found
        received = [run for _, run in pairs]
        flipped: memoryview = draw.choice(self.read(received, layers))
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        # The caller detects the damage by comparing this checksum with the sender's.
        found = self.checksum(received, layers)
        return found

    storage.receive = receive_and_flip


if __name__ == "__main__":
    if share := float(os.environ.get(KV_DAMAGE_VARIABLE, "0")):
        damage_kv_transfers(share)
    worker_main.main()
