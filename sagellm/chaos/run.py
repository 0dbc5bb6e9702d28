"""Runs a scenario: once without faults in this process, then over processes with them."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from sagellm.builder import Graph
from sagellm.chaos.checks import Check, metric_value, read_check
from sagellm.chaos.launcher import RelayedProcesses
from sagellm.chaos.relay import Faults
from sagellm.chaos.scenario import LASTING, Event, FdLimit, Load, Loaded, ScenarioError, Toxic
from sagellm.chaos.worker import VARIABLE
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.runtime.cluster.options import ProcessesOptions
from sagellm.runtime.cluster.worker import Worker
from sagellm.runtime.ledger import LedgerError
from sagellm.runtime.messages import SERVED, Sampling
from sagellm.session import Session

_IDS = range(20, 120)  # token ids that every model has
_SETTLE_S = 30.0  # for what is left to end, after the last stream


@dataclass
class Outcome:
    """What came of the streams of one run."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (load, number)
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def fewest(self) -> int:
        """Tokens that every stream that still runs has had."""
        running = [len(found) for key, found in self.tokens.items() if key not in self.reasons]
        return min(running, default=0)


@dataclass
class Report:
    """What a scenario came to; `failed` checks, each with what was found."""

    name: str
    num_streams: int = 0
    num_unserved: int = 0
    num_different: int = 0
    num_migrated: int = 0
    num_restarts: int = 0
    num_damaged_chunks: int = 0
    num_flipped: int = 0
    num_resets: int = 0
    longest_gap_s: float = 0.0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def is_passed(self) -> bool:
        return not self.failed

    def figures(self) -> Mapping[str, float]:
        found = asdict(self)
        del found["name"], found["failed"]
        return found


async def run_scenario(loaded: Loaded, seed: int = 0) -> Report:
    """Raises ScenarioError, GraphError, and what opening the graph raises."""
    scenario = loaded.scenario
    report = Report(scenario.name)
    checks = [read_check(text, report.figures()) for text in scenario.checks]
    graph, options = Graph.load(loaded.graph), dict(scenario.set)
    plain = {name: value for name, value in options.items() if not name.startswith("executor.")}
    async with graph.open(set=plain, executor="tasks") as session:
        right = await _undisturbed(session, scenario.events)
    launchers: list[RelayedProcesses] = []

    def launch(options: ProcessesOptions) -> RelayedProcesses:
        if scenario.kv_damage and options.kv != "memory":
            raise ScenarioError(f"kv_damage is for executor.kv: memory, not {options.kv}")
        launchers.append(RelayedProcesses(options, seed))
        return launchers[0]

    with _environment(VARIABLE, str(scenario.kv_damage)):
        opening = graph.open(set=options, executor="processes")
        opening.launch_by(launch)
        async with opening as session:
            meters = GatewayMeters(session, models=("chaos",), endpoints=())
            player = _Player(session, launchers[0], Outcome())
            began_s = trio.current_time()
            with player.undoing():
                await player.play(scenario.events)
            report.seconds = round(trio.current_time() - began_s, 3)
            report.failed += await _at_rest(session)
            _fill(report, player, session, launchers[0], right)
            families = list(meters.families(await meters.snapshot()))
            report.failed += _failures(report, checks, partial(metric_value, families))
    return report


async def _undisturbed(session: Session, events: tuple[Event, ...]) -> Outcome:
    """All loads at once: what else runs changes no token."""
    outcome = Outcome()
    async with trio.open_nursery() as nursery:
        for number, event in enumerate(events):
            if event.load is not None:
                _begin(session, outcome, number, event.load, nursery)
    return outcome


def _begin(
    session: Session, outcome: Outcome, number: int, load: Load, nursery: trio.Nursery
) -> None:
    for stream in range(load.streams):
        nursery.start_soon(_stream, session, outcome, (number, stream), load)


async def _stream(session: Session, outcome: Outcome, key: tuple[int, int], load: Load) -> None:
    draw = random.Random(f"{load.seed} {key}")
    prompt = draw.choices(_IDS, k=load.prompt_tokens)
    sampling = Sampling(
        max_tokens=load.max_tokens,
        temperature=load.temperature,
        seed=draw.getrandbits(32),
        ignore_eos=True,
    )
    outcome.tokens[key] = []
    heard_s: float | None = None
    async with session.stream(prompt, sampling=sampling) as stream:
        async for event in stream:
            now = trio.current_time()
            if heard_s is not None:
                outcome.gaps_s.append(now - heard_s)
            heard_s = now
            outcome.tokens[key] += event.token_ids
            if event.finish_reason is not None:
                outcome.reasons[key] = event.finish_reason


class _Player:
    """Makes the events of a scenario happen, and undoes what lasts."""

    def __init__(self, session: Session, launcher: RelayedProcesses, outcome: Outcome) -> None:
        self.outcome = outcome
        self._session = session
        self._launcher = launcher
        self._lasting: dict[int, Callable[[], None]] = {}
        self._read_clock = time.time
        self._jumps_s: dict[int, float] = {}

    async def play(self, events: tuple[Event, ...]) -> None:
        """Returns once every event has happened, and every stream has ended."""
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, event in enumerate(events):
                await self._await_time(event, began_s)
                if event.load is not None:
                    _begin(self._session, self.outcome, number, event.load, nursery)
                else:
                    nursery.start_soon(self._happen, number, event)

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Whatever happens, what lasts ends."""
        try:
            yield
        finally:
            for number in tuple(self._lasting):
                self._undo(number)

    async def _await_time(self, event: Event, began_s: float) -> None:
        if event.at_s is not None:
            await trio.sleep_until(max(began_s + event.at_s, trio.current_time()))
        while event.after_tokens is not None and self.outcome.fewest < event.after_tokens:
            if self.outcome.tokens and len(self.outcome.reasons) == len(self.outcome.tokens):
                raise ScenarioError(f"no stream has {event.after_tokens} tokens: all have ended")
            await trio.sleep(0.001)

    async def _happen(self, number: int, event: Event) -> None:
        await getattr(self, f"_{event.kind}")(number, getattr(event, event.kind))
        if event.kind in LASTING and event.for_s is not None:
            await trio.sleep(event.for_s)
            self._undo(number)

    def _undo(self, number: int) -> None:
        undo = self._lasting.pop(number, None)
        if undo is not None:
            undo()

    # ---- events ----------------------------------------------------------------------------

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
        faults, clean = self._faults(toxic.worker), Faults()
        names = ("delay_s", "chunk_bytes", "reset_every", "flip")
        for name in names:
            setattr(faults, name, getattr(toxic, name))
        faults.bytes_per_s = toxic.bytes_per_s or clean.bytes_per_s

        def heal() -> None:
            for name in (*names, "bytes_per_s"):
                setattr(faults, name, getattr(clean, name))

        self._lasting[number] = heal

    async def _corrupt(self, number: int, worker: str) -> None:
        self._faults(worker).num_to_flip += 1

    async def _fd_limit(self, number: int, limit: FdLimit) -> None:
        pid = os.getpid() if limit.of == "graph" else self._pid(limit.of)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit.files, hard))

        def restore() -> None:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

        self._lasting[number] = restore

    async def _clock_jump_s(self, number: int, jump_s: float) -> None:
        """The wall clock of the graph's process, as Python code reads it."""
        self._jumps_s[number] = jump_s
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

    async def _scale(self, number: int, scale: Any) -> None:
        assert self._session.supervisor is not None
        await self._session.supervisor.scale(scale.engine, scale.replicas)

    # ---- whom they happen to ---------------------------------------------------------------

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

    def _faults(self, name: str) -> Faults:
        return self._launcher.relays[self._pid(name)].faults


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was given up meanwhile
        os.kill(pid, number)


async def _at_rest(session: Session) -> list[str]:
    """What is wrong with the books once nothing runs any more: each request ended once, each token
    once and in order, no block leased.
    """
    with trio.move_on_after(_SETTLE_S) as waiting:
        await session.idle()
    if waiting.cancelled_caught:
        return [f"ledger: something still runs after {_SETTLE_S:g} s"]
    try:
        session.executor.ledger.check()
    except LedgerError as error:
        return [f"ledger: {error}"]
    loads = [load for pool in session.statistics().engines.values() for load in pool]
    num_leased = sum(load.num_leased_blocks for load in loads)
    return [f"ledger: {num_leased} blocks are leased to nobody"] if num_leased else []


def _fill(
    report: Report, player: _Player, session: Session, launcher: RelayedProcesses, right: Outcome
) -> None:
    found = player.outcome
    report.num_streams = len(found.tokens)
    report.num_unserved = report.num_streams - sum(
        reason in SERVED for reason in found.reasons.values()
    )
    report.num_different = sum(
        found.tokens.get(key) != tokens for key, tokens in right.tokens.items()
    )
    report.num_migrated = session.executor.recovery.num_migrated
    report.longest_gap_s = round(max(found.gaps_s, default=0.0), 3)
    assert session.supervisor is not None
    for worker in session.supervisor.workers:
        report.num_restarts += worker.restarts.count
        if worker.engine is not None:
            report.num_damaged_chunks += worker.engine.load.num_damaged_chunks
    report.num_flipped = sum(relay.num_flipped for relay in launcher.relays.values())
    report.num_resets = sum(relay.num_resets for relay in launcher.relays.values())


def _failures(
    report: Report, checks: list[Check], metric: Callable[[Check], float | None]
) -> Iterator[str]:
    for check in checks:
        found = report.figures().get(check.name)
        found = metric(check) if found is None else found
        if found is None:
            yield f"{check.text}: there is no such metric"
        elif not check.holds(found):
            yield f"{check.text}: it is {found:g}"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Of the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
