"""How a worker process begins: what it is told, on which clock it runs, and what it does."""

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

_VARIABLE = "SAGELLM_WORKER"  # an environment is for the eyes of its user alone, arguments are not
_SPARE = "spare:"  # instead of a start, which then comes as a line of standard input

# graph, engine, replica, blocks of its pool in an earlier life; called with events of the start
OpenEngine: TypeAlias = Callable[[Graph, str, int, int | None, Progress], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """Where to connect, under which name, in which life; what the clock is ahead; the folder that
    goes with the graph's process; and that of the keys, where links have any.
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
    """Of a process that prepares for engines on those devices, and waits for its start."""
    return {_VARIABLE: _SPARE + ",".join(devices)}


class SharedClock(trio.abc.Clock):
    """The clock of the process that started this one."""

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
    """Be a worker until told to stop, or until whoever started it is gone.

    `open_engine` loads one replica; what it raises of `unfit` is told, and safe to
    show. Anything else ends the process with a traceback. `prepare` is what a spare does before it
    waits for its start.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # whoever signals all processes means the graph's
    given = os.environ.pop(_VARIABLE)
    if given.startswith(_SPARE):
        prepare([device for device in given.removeprefix(_SPARE).split(",") if device])
        given = _line_of_input()
        if not given:  # whoever started it is gone, or needs it no more
            return
    start = msgspec.json.decode(given, type=WorkerStart)
    end_with_parent(Path(start.folder))
    trio.run(_serve, start, open_engine, unfit, clock=SharedClock(start.clock_offset_s))


def _line_of_input() -> str:
    """Byte by byte, as the end of the input is watched afterwards; empty at its end."""
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
        with suppress(ChannelClosed):  # nobody is left to serve
            await work(dealer.link, open_engine, unfit)
        nursery.cancel_scope.cancel()


async def work(
    channel: Channel, open_engine: OpenEngine, unfit: tuple[type[Exception], ...]
) -> None:
    """What a worker does, whatever it runs in: open the engine that it is told, and serve it."""
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
    """Sends what it hears, from whichever thread, for as long as somebody listens."""
    token = trio.lowlevel.current_trio_token()

    def put(event: ProgressEvent) -> None:
        with suppress(ChannelClosed):
            channel.put(Starting(event=event))

    def progress(event: ProgressEvent) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(put, event)

    return progress
