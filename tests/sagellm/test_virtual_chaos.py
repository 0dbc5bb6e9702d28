"""Workers die, hang, garble and restart for a virtual hour: nothing is lost."""

import os
from pathlib import Path

import pytest
import trio
import trio._core._run as core
from endings import generate
from trio.testing import MockClock
from virtual_workers import EXCUSED, bursts, chaotic

from sagellm import Graph, Sampling, ops
from sagellm.backends.null import null_token
from sagellm.opening.decisions import replay
from sagellm.runtime.cluster.child_process import RestartPolicy

LONG = Sampling(max_tokens=1000, ignore_eos=True)
HOURS = float(os.environ.get("SAGELLM_CHAOS_HOURS", "1"))  # virtual ones, a seed
NEVER = RestartPolicy(first_s=1e9, longest_s=1e9)
SEEDS = range(int(os.environ.get("SAGELLM_CHAOS_SEEDS", "5")))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.timeout(120 + 60 * HOURS)
def test_hours_of_faults_lose_no_request_and_no_token(seed: int, tmp_path: Path) -> None:
    """A replay of the event log then repeats every decision."""
    log = tmp_path / "decisions"
    run(seed, 3600 * HOURS, log)
    replayed = replay(log, functions={})
    assert replayed.difference is None
    assert min(replayed.num_events, replayed.num_effects) > 100
    assert not replayed.is_cut


def test_another_strategy_decides_otherwise_from_some_event_on(tmp_path: Path) -> None:
    log = tmp_path / "decisions"
    run(3, 600.0, log)
    replayed = replay(log, functions={}, overrides={"route.strategy": "round_robin"})
    found = replayed.difference
    assert found is not None
    assert found.recorded[0][0] == found.replayed[0][0] == "send"
    assert found.recorded != found.replayed


def queueless() -> Graph:
    """New requests wait in front of the graph; those of a lost engine wait for the router."""
    graph = Graph("queueless").engine("g", replicas=2)
    return graph >> ops.route() >> ops.generate(engine="g")


@pytest.mark.parametrize("name", ["joint", "pd", "queueless"])
async def test_nobody_waits_for_ever_for_what_does_not_come_back(
    name: str, autojump_clock: MockClock
) -> None:
    """A request waits in a queue, or for a replica to become available."""
    graph = queueless() if name == "queueless" else Graph.load(name)
    async with chaotic(graph, 1, max_hold_s=20.0, policy=NEVER) as chaos:
        answers = []

        async def ask() -> None:
            answers.append(await generate(chaos.session, [1] * 100, sampling=LONG))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.sleep(3)
            for life in chaos.lives.lives:
                life.kill()
            killed_s = trio.current_time()
        waited_s = trio.current_time() - killed_s
    assert {answer.code for answer in answers} == {"unavailable"}
    assert 20.0 <= waited_s < 26.0


def test_a_seed_replays_exactly() -> None:
    assert run(7, 900.0) == run(7, 900.0)


def run(seed: int, seconds: float, log: Path | None = None) -> object:
    """Run in virtual time. The seed also decides the order of trio's tasks."""
    before = core._ALLOW_DETERMINISTIC_SCHEDULING
    core._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    core._r.seed(seed)
    try:
        return trio.run(survives, seed, seconds, log, clock=MockClock(autojump_threshold=0))
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING = before  # type: ignore[misc]


async def survives(seed: int, seconds: float, log: Path | None) -> object:
    """Every answer has its full length, and the tokens of its seed, on any replica."""
    graph = Graph.load(("pd_many", "pd", "joint")[seed % 3]) if seed % 4 else queueless()
    async with chaotic(graph, seed, decisions=log) as chaos, trio.open_nursery() as nursery:
        nursery.start_soon(chaos.run, 40.0)
        record = await bursts(chaos.session, seed, seconds, 30.0)
        nursery.cancel_scope.cancel()
    vocab_size = chaos.lives.engines[0]._resources.vocab_size
    for number, answer in record.answers.items():
        asked = range(record.asked[number])
        right = tuple(null_token(number, 0, position, vocab_size) for position in asked)
        assert answer == right, (seed, number, chaos.done)
    assert set(record.reasons) <= {"length", *EXCUSED}, (seed, record.reasons)
    assert record.reasons["request_quarantined"] <= len(record.answers) / 1000, record.reasons
    assert len(chaos.done) > seconds / 80
    assert len(record.answers) > seconds / 30
    return chaos.done, record
