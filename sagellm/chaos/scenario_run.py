"""Runs a scenario twice: without faults in this process, then with faults in worker processes.

The second run must produce the same tokens as the first.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import trio

from sagellm.builder import Graph
from sagellm.chaos.player import Player, StreamOutcomes, begin_streams
from sagellm.chaos.relay import KV_DAMAGE_VARIABLE, RelayedProcesses
from sagellm.chaos.scenario import (
    Check,
    LoadedScenario,
    ScenarioError,
    ScenarioEvent,
    metric_value,
    read_check,
)
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.gateway.protocol.sampling_params import model_cards
from sagellm.gateway.settings import Settings
from sagellm.runtime.cluster.executor_options import ProcessesOptions
from sagellm.runtime.core.accounting import LedgerError
from sagellm.runtime.messages import SERVED
from sagellm.session import Session

_SETTLE_S = 30.0  # for requests that end after the last stream


@dataclass
class ScenarioReport:
    """The result of a scenario. `failed`: a text for each failed check, with the found value.

    `num_different`: streams whose tokens differ from those of the run without faults.
    """

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


async def run_scenario(
    loaded: LoadedScenario, seed: int = 0, decisions: Path | None = None
) -> ScenarioReport:
    """Run a scenario. `decisions`: a file for the decision log of the run with faults.

    Raises ScenarioError, GraphError, and the other errors of opening a graph.
    """
    scenario = loaded.scenario
    report = ScenarioReport(scenario.name)
    checks = [read_check(text, report.figures()) for text in scenario.checks]
    graph, options = Graph.load(loaded.graph), dict(scenario.set)
    # The run without faults has executor `tasks`, which refuses the options of `processes`.
    plain = {name: value for name, value in options.items() if not name.startswith("executor.")}
    async with graph.open(set=plain, executor="tasks") as session:
        right = await _undisturbed(session, scenario.events)
    launchers: list[RelayedProcesses] = []

    def launch(options: ProcessesOptions) -> RelayedProcesses:
        if scenario.kv_damage and options.kv != "memory":
            raise ScenarioError(f"kv_damage is for executor.kv: memory, not {options.kv}")
        launchers.append(RelayedProcesses(options, seed))
        return launchers[0]

    # Worker processes read this variable when they start.
    with _environment(KV_DAMAGE_VARIABLE, str(scenario.kv_damage)):
        opening = graph.open(set=options, executor="processes", decisions=decisions)
        opening.launch_by(launch)
        async with opening as session:
            # Checks may name any metric that a gateway exposes.
            cards = model_cards(session, Settings(served_models=("chaos",)))
            meters = GatewayMeters(session, models=cards, endpoints=())
            player = Player(session, launchers[0], StreamOutcomes())
            began_s = trio.current_time()
            with player.undoing():
                await player.play(scenario.events)
            report.seconds = round(trio.current_time() - began_s, 3)
            report.failed += await _at_rest(session)  # first: late requests change the figures
            _fill(report, player, session, launchers[0], right)
            families = list(meters.families(await meters.snapshot()))
            report.failed += _failures(report, checks, partial(metric_value, families))
    return report


async def _undisturbed(session: Session, events: tuple[ScenarioEvent, ...]) -> StreamOutcomes:
    """Run the streams without faults. All loads start at once: concurrency changes no token."""
    outcome = StreamOutcomes()
    async with trio.open_nursery() as nursery:
        for number, event in enumerate(events):
            if event.load is not None:
                begin_streams(session, outcome, number, event.load, nursery)
    return outcome


async def _at_rest(session: Session) -> list[str]:
    """Wait until no request runs, then check the ledger and the leases; return the violations.

    Each request must have ended once, each token must have come once and in order, and no block may
    be leased.
    """
    with trio.move_on_after(_SETTLE_S) as waiting:
        await session.idle()
    if waiting.cancelled_caught:
        return [f"ledger: something still runs after {_SETTLE_S:g} s"]
    try:
        session.executor.core.ledger.check()
    except LedgerError as error:
        return [f"ledger: {error}"]
    loads = [load for pool in session.statistics().engines.values() for load in pool]
    num_leased = sum(load.num_leased_blocks for load in loads)
    return [f"ledger: {num_leased} blocks are leased to nobody"] if num_leased else []


def _fill(
    report: ScenarioReport,
    player: Player,
    session: Session,
    launcher: RelayedProcesses,
    right: StreamOutcomes,
) -> None:
    found = player.outcome
    report.num_streams = len(found.tokens)
    report.num_unserved = report.num_streams - sum(
        reason in SERVED for reason in found.reasons.values()
    )
    report.num_different = sum(
        found.tokens.get(key) != tokens for key, tokens in right.tokens.items()
    )
    report.num_migrated = session.executor.core.recovery.num_migrated
    report.longest_gap_s = round(max(found.gaps_s, default=0.0), 3)
    assert session.supervisor is not None
    for worker in session.supervisor.workers:
        report.num_restarts += worker.restarts.count
        if worker.engine is not None:
            report.num_damaged_chunks += worker.engine.load.num_damaged_chunks
    report.num_flipped = sum(relay.num_flipped for relay in launcher.relays.values())
    report.num_resets = sum(relay.num_resets for relay in launcher.relays.values())


def _failures(
    report: ScenarioReport, checks: list[Check], metric: Callable[[Check], float | None]
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
    """Set an environment variable during the block, for processes that start there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
