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

# The environment carries the start, because every user can read the arguments of a process.
_VARIABLE = "SAGELLM_WORKER"
_SPARE = "spare:"  # begins the variable of a spare, whose start comes later on standard input

# Takes a graph, the name of an engine, a replica, its number of KV blocks in an earlier life (None:
# choose it), and a function for progress events.
OpenEngine: TypeAlias = Callable[[Graph, str, int, int | None, Progress], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """The data that a worker starts with: the endpoint to connect to, the worker's name there, and
    the number of its life (`epoch`).

    `clock_offset_s`: the graph's clock minus `perf_counter`, in seconds. `folder`: the folder of
    sockets, which the worker removes if the graph's process is killed. `keys`: the folder of CURVE
    keys; None: the link is not encrypted.
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
    """The environment of a spare process, which prepares for engines on `devices` and then waits
    for its start.
    """
    return {_VARIABLE: _SPARE + ",".join(devices)}


class SharedClock(trio.abc.Clock):
    """Shows the time of the graph's process, so that deadlines are valid in both processes."""

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
    """Run a worker until a stop message, or until the parent process ends.

    `open_engine` loads one replica. Its errors of the types `unfit` are safe to show, and are sent
    to the graph; any other error ends the process with a traceback. A spare process calls `prepare`
    with its devices before it waits for its start.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # a signal that is sent to all processes is meant for the graph's process alone
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
    """Read a line of standard input; "" if the input ends.

    Bytes are read one by one: a buffer could take bytes that `end_with_parent` must see later.
    """
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
    """Receive an `Open` message, open its engine, and serve the engine until a stop message.

    Worker processes and worker tasks both run this function.
    """
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
    """A function that sends progress events to the graph, and may be called from any thread."""
    token = trio.lowlevel.current_trio_token()

    def put(event: ProgressEvent) -> None:
        with suppress(ChannelClosed):
            channel.put(Starting(event=event))

    def progress(event: ProgressEvent) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(put, event)

    return progress
