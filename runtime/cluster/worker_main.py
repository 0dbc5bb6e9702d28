"""The main function of a worker process: its start, its clock, and its work."""

import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import msgspec
import trio

from sagellm.backends.interface import Progress, ProgressEvent
from sagellm.graphs.ir import Graph
from sagellm.graphs.text.codec import from_msgpack
from sagellm.runtime.cluster.child_process import end_with_parent
from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.keys import load_keys
from sagellm.runtime.comm.protocol import Open, Starting, Stop, Unfit
from sagellm.runtime.comm.zeromq import Dealer
from sagellm.runtime.engine.engine_server import EngineServer
from sagellm.runtime.port import Engine
from sagellm.runtime.prefixes import set_hash_secret

_VARIABLE = "SAGELLM_WORKER"  # only its user can read an environment; every user can read arguments
_SPARE = "spare:"  # in place of a start, which comes later as a line of standard input

# Takes a graph, the name of an engine, a replica, the size of its pool in an earlier life, and a
# function that gets events of the start.
OpenEngine: TypeAlias = Callable[[Graph, str, int, int | None, Progress], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """What a worker is told: the endpoint to connect to, its name there, and its life (`epoch`).

    `clock_offset_s`: by how much the graph's clock is ahead of `perf_counter`. `folder`: the
    sockets, which the worker removes if the graph's process is killed. `keys`: the folder of CURVE
    keys.
    """

    endpoint: str
    name: str
    epoch: int
    clock_offset_s: float
    folder: str
    keys: str | None = None

    @property
    def env(self) -> Mapping[str, str]:
        return {_VARIABLE: self.line.decode()}

    @property
    def line(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"


def spare_env(devices: Iterable[str]) -> Mapping[str, str]:
    """The environment of a spare, which prepares for engines on `devices` and waits for its
    start.
    """
    return {_VARIABLE: _SPARE + ",".join(devices)}


class SharedClock(trio.abc.Clock):
    """The clock of the parent process: deadlines mean the same in both."""

    def __init__(self, offset_s: float) -> None:
        self._offset_s = offset_s

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return perf_counter() + self._offset_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()


def serve(
    open_engine: OpenEngine,
    unfit: tuple[type[Exception], ...],
    prepare: Callable[[Sequence[str]], None] = lambda devices: None,
) -> None:
    """Be a worker until a stop message, or until the parent process is gone.

    `open_engine` loads one replica. Its errors of the types `unfit` are sent to the graph, as they
    are safe to show; any other error ends the process with a traceback. A spare calls `prepare`
    with the devices before it waits for its start.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # a signal to all processes is for the graph's process
    given = os.environ.pop(_VARIABLE)
    if given.startswith(_SPARE):
        prepare([device for device in given.removeprefix(_SPARE).split(",") if device])
        given = _line_of_input()
        if not given:  # the parent is gone, or needs this spare no more
            return
    start = msgspec.json.decode(given, type=WorkerStart)
    end_with_parent(Path(start.folder))
    trio.run(_serve, start, open_engine, unfit, clock=SharedClock(start.clock_offset_s))


def _line_of_input() -> str:
    """Read a line byte by byte: `end_with_parent` watches the same input later. "": the end."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode() if byte else ""


async def _serve(
    start: WorkerStart, open_engine: OpenEngine, unfit: tuple[type[Exception], ...]
) -> None:
    keys = load_keys(Path(start.keys), "worker") if start.keys is not None else None
    dealer = Dealer(start.endpoint, bytes.fromhex(start.name), start.epoch, keys)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dealer.run)
        with suppress(ChannelClosed):  # the graph is gone
            await work(dealer.link, open_engine, unfit)
        nursery.cancel_scope.cancel()


async def work(
    channel: Channel, open_engine: OpenEngine, unfit: tuple[type[Exception], ...]
) -> None:
    """Open the engine of the first message, and serve it. Runs in a process or in a task."""
    message = await channel.receive()
    if not isinstance(message, Open):
        return
    set_hash_secret(message.block_key)
    asked = from_msgpack(message.graph), message.engine, message.replica, message.num_blocks
    try:
        engine = await open_engine(*asked, _progress_over(channel))
    except unfit as error:
        channel.put(Unfit(error=str(error)))
        while not isinstance(await channel.receive(), Stop):
            pass
        return
    await EngineServer(engine, channel).run()


def _progress_over(channel: Channel) -> Progress:
    """A progress function that sends events to the graph; callable from any thread."""
    token = trio.lowlevel.current_trio_token()

    def put(event: ProgressEvent) -> None:
        with suppress(ChannelClosed):
            channel.put(Starting(event=event))

    def progress(event: ProgressEvent) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(put, event)

    return progress
