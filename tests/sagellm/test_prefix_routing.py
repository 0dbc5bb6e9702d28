"""Requests go to the replica with their prefix, in virtual time and over processes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from virtual_workers import chaotic

from sagellm import Graph, Sampling, ops
from sagellm.opening.decisions import replay
from sagellm.runtime.prefixes import hash_secret, set_hash_secret
from sagellm.session import Session

NULL = {
    "model": "null",
    "device": "null",
    "replicas": 2,
    "max_num_seqs": 8,
    "decode_step_s": 0.01,
    "prefill_token_s": 1e-3,
}
GROUPS = 3


def routed(strategy: str, options: Any = None, **engine: Any) -> Graph:
    graph = Graph("g").engine("g", **{**NULL, **engine})
    route = ops.route(strategy, strategy_options=options or {})
    graph >> ops.policy_sort("fifo") >> route >> ops.generate(engine="g") >> ops.metrics_sink()
    return graph


def prompt(group: int, turn: int, shared: int = 200) -> list[int]:
    """Prompts of one group begin alike."""
    return [10 + group] * shared + [100 + turn] * 20


async def ask(session: Session, group: int, turn: int, **fields: Any) -> Any:
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    return await session.generate(prompt(group, turn), sampling=sampling, **fields)


async def hits(session: Session, num_turns: int = 6) -> tuple[int, list[int]]:
    """Cached tokens of all prompts, and each replica's own count of them."""
    cached = 0
    for turn in range(num_turns):
        for group in range(GROUPS):
            cached += (await ask(session, group, turn)).num_cached_tokens
    await session.idle()
    return cached, [engine.load.num_prefix_hits for engine in session.executor.all_engines]


async def test_groups_stay_with_their_prefix(autojump_clock: MockClock) -> None:
    found = {}
    for strategy in ("round_robin", "prefix_aware"):
        async with routed(strategy).open() as session:
            begun_s = trio.current_time()
            cached, by_replica = await hits(session)
            found[strategy] = cached, trio.current_time() - begun_s
            assert sum(by_replica) == cached
            assert all(by_replica)  # no replica is idle
    assert found["prefix_aware"][0] == GROUPS * 5 * 192  # all but the first of each group
    assert found["round_robin"][0] == GROUPS * 4 * 192
    assert found["prefix_aware"][1] < found["round_robin"][1]


async def test_tenants_do_not_draw_each_other(autojump_clock: MockClock) -> None:
    async with routed("prefix_aware").open() as session:
        cached = [
            (await ask(session, 0, 0, salt=salt)).num_cached_tokens
            for salt in ("one", "other", "other", "one", "one", "other")
        ]
        assert cached == [0, 0, 208, 208, 208, 208]
        loads = [engine.load for engine in session.executor.all_engines]
        assert [load.num_prefix_queries for load in loads] == [660, 660]  # one tenant each


async def test_what_a_router_knows_is_what_engines_have(autojump_clock: MockClock) -> None:
    """The same under eviction, when blocks run out."""
    async with routed("prefix_aware", num_blocks=40, max_model_len=512).open() as session:
        async with trio.open_nursery() as nursery:
            for turn in range(30):
                nursery.start_soon(ask, session, turn % 7, turn)
        await session.idle()
        await ask(session, 0, 99)
        known: Any = session.executor.core.prefixes
        for replica, engine in enumerate(session.executor.all_engines):
            there = set(engine.pool._tree.hashes)  # type: ignore[attr-defined]
            assert set(known._reporters["g", replica].blocks) == there
        assert sum(one.load.num_evicted_blocks for one in session.executor.all_engines) > 0


async def test_a_held_request_waits_for_its_prefix_and_no_longer(
    autojump_clock: MockClock,
) -> None:
    """Replica 0 has the prefix and one place, which is taken for 1 s."""
    options = {"max_hold_s": 0.3}
    async with routed("prefix_aware", options, max_num_seqs=1).open() as session:
        await ask(session, 0, 0)
        for num_tokens, cached in ((20, True), (100, False)):
            async with trio.open_nursery() as nursery:
                sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
                busy = partial(session.generate, prompt(0, 1), sampling=sampling)
                nursery.start_soon(busy)
                await trio.sleep(0.01)
                begun_s = trio.current_time()
                answer = await ask(session, 0, 2)
                waited_s = answer.stamps.dispatched_s - begun_s
                assert (answer.num_cached_tokens > 0) == cached
                if cached:
                    assert 0.1 < waited_s < 0.3
                else:
                    assert waited_s == pytest.approx(0.3)


async def test_a_worker_that_was_lost_is_not_taken_for_warm(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    async with chaotic(routed("prefix_aware"), 1, decisions=log) as chaos:
        session = chaos.session
        for turn in range(4):
            await ask(session, 0, turn)
        known = session.executor.core.prefixes
        before = [known.num_blocks_of("g", replica) for replica in (0, 1)]
        assert sorted(before)[0] == 0
        warm = before.index(max(before))
        pids = {worker.replica: worker.pid for worker in chaos.supervisor.workers}
        (life,) = (one for one in chaos.lives.lives if one.pid == pids[warm])
        life.kill()
        await trio.sleep(0.1)
        assert known.num_blocks == 0
        await ask(session, 0, 5)
        assert known.num_blocks_of("g", 1 - warm) > 0
        await trio.sleep(30.0)  # it is back, with an empty cache
        for group in (1, 2):
            await ask(session, group, 6)
        assert known.num_blocks_of("g", warm) > 0
    kept = hash_secret()
    set_hash_secret(bytes(32))  # as another process has another one
    try:
        replayed = replay(log, functions={})
        without = replay(log, functions={}, overrides={"route.strategy": "round_robin"})
    finally:
        set_hash_secret(kept)
    assert replayed.difference is None
    assert replayed.num_events > 50
    assert without.difference is not None


@pytest.mark.in_process
async def test_workers_and_router_hash_alike(tmp_path: Path) -> None:
    """Workers get the secret of the graph: with their own secrets, hashes would differ."""
    graph = routed("prefix_aware", prefill_token_s=0.0, decode_step_s=0.001)
    async with graph.open(executor="processes") as session:
        cached, by_replica = await hits(session, num_turns=3)
        assert cached == GROUPS * 2 * 192
        assert sum(by_replica) == cached
        assert session.executor.core.prefixes.num_blocks > 0
