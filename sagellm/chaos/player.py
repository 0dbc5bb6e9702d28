"""Plays a scenario: starts its streams, causes its events, and undoes lasting events."""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

from sagellm.chaos.relay import LinkFaults, RelayedProcesses
from sagellm.chaos.scenario import (
    LASTING,
    FdLimit,
    Scale,
    ScenarioError,
    ScenarioEvent,
    StreamLoad,
    Toxic,
)
from sagellm.runtime.cluster.worker import Worker
from sagellm.runtime.sampling import Sampling
from sagellm.session import Session

_IDS = range(20, 120)  # token ids that every model has


@dataclass
class StreamOutcomes:
    """The streams of one run: tokens, finish reasons, and gaps between outputs in seconds."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (load, stream) -> ids
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def fewest(self) -> int:
        """The smallest number of tokens of an open stream; 0 if none is open."""
        running = [len(found) for key, found in self.tokens.items() if key not in self.reasons]
        return min(running, default=0)


def begin_streams(
    session: Session, outcome: StreamOutcomes, number: int, load: StreamLoad, nursery: trio.Nursery
) -> None:
    """Start all streams of a load in `nursery`. `number`: the number of the load's event."""
    for stream in range(load.streams):
        nursery.start_soon(_stream, session, outcome, (number, stream), load)


async def _stream(
    session: Session, outcome: StreamOutcomes, key: tuple[int, int], load: StreamLoad
) -> None:
    # Equal in the runs with and without faults, whose tokens are compared.
    draw = random.Random(f"{load.seed} {key}")
    prompt = draw.choices(_IDS, k=load.prompt_tokens)
    sampling = Sampling(
        max_tokens=load.max_tokens,
        temperature=load.temperature,
        seed=draw.getrandbits(32),
        ignore_eos=True,  # every stream has `max_tokens` tokens
    )
    outcome.tokens[key] = []
    last_s: float | None = None
    async with session.stream(prompt, sampling=sampling) as stream:
        while outputs := await stream.take():
            now = trio.current_time()
            if last_s is not None:
                outcome.gaps_s.append(now - last_s)
            last_s = now
            for event in outputs:
                outcome.tokens[key] += event.token_ids
                if event.finish_reason is not None:
                    outcome.reasons[key] = event.finish_reason


class Player:
    """Causes the events of one scenario. Its streams record their results in `outcome`."""

    def __init__(
        self, session: Session, launcher: RelayedProcesses, outcome: StreamOutcomes
    ) -> None:
        self.outcome = outcome
        self._session = session
        self._launcher = launcher
        self._lasting: dict[int, Callable[[], None]] = {}
        self._read_clock = time.time
        self._jumps_s: dict[int, float] = {}

    async def play(self, events: tuple[ScenarioEvent, ...]) -> None:
        """Play all events, and return when the last event is over and every stream has ended."""
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, event in enumerate(events):
                await self._await_time(event, began_s)
                if event.load is not None:
                    begin_streams(self._session, self.outcome, number, event.load, nursery)
                else:
                    nursery.start_soon(self._happen, number, event)

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Undo all lasting events at the end of the block, even after an error."""
        try:
            yield
        finally:
            for number in tuple(self._lasting):
                self._undo(number)

    async def _await_time(self, event: ScenarioEvent, began_s: float) -> None:
        if event.at_s is not None:
            await trio.sleep_until(max(began_s + event.at_s, trio.current_time()))
        while event.after_tokens is not None and self.outcome.fewest < event.after_tokens:
            if self.outcome.tokens and len(self.outcome.reasons) == len(self.outcome.tokens):
                raise ScenarioError(f"no stream has {event.after_tokens} tokens: all have ended")
            await trio.sleep(0.001)

    async def _happen(self, number: int, event: ScenarioEvent) -> None:
        await getattr(self, f"_{event.kind}")(number, getattr(event, event.kind))
        if event.kind in LASTING and event.for_s is not None:
            await trio.sleep(event.for_s)
            self._undo(number)

    def _undo(self, number: int) -> None:
        undo = self._lasting.pop(number, None)
        if undo is not None:
            undo()

    # `_happen` calls one of these methods by the event's kind. `number` is the event's number.

    async def _kill(self, number: int, worker: str) -> None:
        self._signal(worker, signal.SIGKILL)

    async def _sigterm(self, number: int, worker: str) -> None:
        self._signal(worker, signal.SIGTERM)

    async def _stop(self, number: int, worker: str) -> None:
        pid = self._signal(worker, signal.SIGSTOP)
        self._lasting[number] = partial(_send, pid, signal.SIGCONT)

    async def _cont(self, number: int, worker: str) -> None:
        self._signal(worker, signal.SIGCONT)

    async def _partition(self, number: int, worker: str) -> None:
        faults = self._faults(worker)
        faults.is_cut = True
        self._lasting[number] = lambda: setattr(faults, "is_cut", False)

    async def _toxic(self, number: int, toxic: Toxic) -> None:
        faults, clean = self._faults(toxic.worker), LinkFaults()
        names = ("delay_s", "chunk_bytes", "reset_every", "flip")
        for name in names:
            setattr(faults, name, getattr(toxic, name))
        faults.bytes_per_s = toxic.bytes_per_s or clean.bytes_per_s

        def restore() -> None:
            for name in (*names, "bytes_per_s"):
                setattr(faults, name, getattr(clean, name))

        self._lasting[number] = restore

    async def _corrupt(self, number: int, worker: str) -> None:
        self._faults(worker).num_to_flip += 1

    async def _fd_limit(self, number: int, limit: FdLimit) -> None:
        pid = os.getpid() if limit.of == "graph" else self._pid(limit.of)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # Only the soft limit changes: raising a hard limit again needs a privilege.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit.files, hard))

        def restore() -> None:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

        self._lasting[number] = restore

    async def _fill_disk(self, number: int, what: str) -> None:
        """Make writes to stderr in the graph's process fail with ENOSPC, as on a full disk."""
        descriptor = sys.stderr.fileno()
        before, full = os.dup(descriptor), os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, descriptor)
        os.close(full)

        def restore() -> None:
            os.dup2(before, descriptor)
            os.close(before)

        self._lasting[number] = restore

    async def _clock_jump_s(self, number: int, jump_s: float) -> None:
        """Move the wall clock of the graph's process: changes what `time.time` returns."""
        self._jumps_s[number] = jump_s
        # Jumps may overlap: the clock moves by their sum.
        time.time = lambda: self._read_clock() + sum(self._jumps_s.values())

        def jump_back() -> None:
            del self._jumps_s[number]
            if not self._jumps_s:
                time.time = self._read_clock

        self._lasting[number] = jump_back

    async def _drain(self, number: int, worker: str) -> None:
        assert self._session.supervisor is not None
        self._session.supervisor.drain(self._worker(worker))

    async def _restart(self, number: int, worker: str) -> None:
        assert self._session.supervisor is not None
        await self._session.supervisor.restart([self._worker(worker)])

    async def _scale(self, number: int, scale: Scale) -> None:
        assert self._session.supervisor is not None
        await self._session.supervisor.scale(scale.engine, scale.replicas)

    def _worker(self, name: str) -> Worker:
        assert self._session.supervisor is not None
        workers = {str(worker): worker for worker in self._session.supervisor.workers}
        if name not in workers:
            raise ScenarioError(f"no worker {name!r}: there are {', '.join(workers)}")
        return workers[name]

    def _pid(self, name: str) -> int:
        pid = self._worker(name).pid
        if pid is None:
            raise ScenarioError(f"worker {name} has no process just now")
        return pid

    def _signal(self, name: str, number: signal.Signals) -> int:
        pid = self._pid(name)
        _send(pid, number)
        return pid

    def _faults(self, name: str) -> LinkFaults:
        # Found by pid: a restarted worker has a new process and a new relay without faults.
        return self._launcher.relays[self._pid(name)].faults


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the process has ended in the meantime
        os.kill(pid, number)
