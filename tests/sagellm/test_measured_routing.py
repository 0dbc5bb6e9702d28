"""Strategies in whole graphs, in virtual time: what they measure, and that a log repeats them."""

from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sagellm import Graph, Sampling, ops
from sagellm.opening.decisions import replay
from sagellm.operators.routing import STRATEGIES

ENGINE = {
    "model": "null",
    "device": "null",
    "max_num_seqs": 8,
    "decode_step_s": 0.01,
    "prefill_token_s": 1e-3,
}
OPTIONS = {
    "weighted_round_robin": {"weights": {"p": [3, 1], "d": [1, 2]}},
    "topology_aware": {"places": {"p": ["r1/a", "r1/b"], "d": ["r1/b", "r1/a"]}},
}


def aggregated(strategy: str, *, has_queue: bool) -> Graph:
    graph = Graph("g").engine("g", **ENGINE, replicas=3)
    head: Any = graph >> ops.policy_sort("fifo") if has_queue else graph
    head >> ops.route(strategy) >> ops.generate(engine="g")
    return graph


def disaggregated(strategy: str) -> Graph:
    graph = Graph("g").engine("p", **ENGINE, replicas=2).engine("d", **ENGINE, replicas=2)
    route = ops.route(strategy, strategy_options=OPTIONS.get(strategy, {}))
    head = graph >> ops.policy_sort("fifo") >> route >> ops.prefill(engine="p")
    head >> ops.kv_transfer() >> ops.decode(engine="d")
    return graph


async def load(session: Any, num_requests: int) -> list[str]:
    """Requests of two groups, 20 ms apart. Returns how each ended."""
    ended = []

    async def ask(number: int) -> None:
        prompt = [number % 2] * 50 + [number] * 20
        sampling = Sampling(max_tokens=5, ignore_eos=True)
        ended.append((await session.generate(prompt, sampling=sampling)).finish_reason)

    async with trio.open_nursery() as nursery:
        for number in range(num_requests):
            nursery.start_soon(ask, number)
            await trio.sleep(0.02)
    return ended


@pytest.mark.parametrize("has_queue", [True, False])
@pytest.mark.parametrize("strategy", ["least_response_time", "predicted_latency"])
async def test_each_replica_is_measured_as_it_is(
    autojump_clock: MockClock, strategy: str, has_queue: bool
) -> None:
    """A prompt token takes 1 ms, and a step without a prompt 10 ms."""
    async with aggregated(strategy, has_queue=has_queue).open() as session:
        assert set(await load(session, 60)) == {"length"}
        view: Any = session.executor.core.logic_graph.cells["route"].state
    for known in view.pools["g"].replicas.values():
        assert known.speed.prefill_s(1000) == pytest.approx(1.0, rel=0.3)
        assert 0.008 <= known.speed.step_s(2) < 0.1
        assert 0.03 < known.speed.first_token_s < 0.1


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.ours))
async def test_a_log_repeats_the_decisions_of_every_strategy(
    autojump_clock: MockClock, tmp_path: Path, strategy: str
) -> None:
    log = tmp_path / "log"
    async with disaggregated(strategy).open(decisions=log) as session:
        assert set(await load(session, 30)) == {"length"}
    replayed = replay(log, functions={})
    assert replayed.difference is None
    assert replayed.num_events > 100
