"""Graphs over processes: the answers of one process, even if a worker is killed."""

import importlib.util
import os
import random
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from dying_sender import ORDER, give_order
from endings import generate
from poisoned_worker import POISON
from process_streams import (
    EXACT,
    GREEDY,
    NUM_STREAMS,
    NUM_TOKENS,
    PROMPTS,
    SEEDED,
    Streams,
    killed,
    num_leased,
    opened,
    ready,
    stream_all,
    worker_of,
)

from sagellm import Graph, Sampling, ops
from sagellm.graphs.diagnostics import GraphError
from sagellm.runtime.cluster import CannotScale
from sagellm.runtime.comm.keys import create_keys
from sagellm.runtime.messages import SERVED
from sagellm.session import Session

NULL = {"p.device": "null", "d.device": "null"}
KNOWN: dict[tuple[str, float], dict[int, list[int]]] = {}


async def right(graph: str, sampling: Sampling) -> dict[int, list[int]]:
    """The answers of the graph in one process."""
    key = graph, sampling.temperature
    if key not in KNOWN:
        async with opened(graph, "tasks") as session:
            KNOWN[key] = (await stream_all(session, sampling)).tokens
    return KNOWN[key]


@pytest.mark.parametrize(
    ("graph", "sampling"),
    [("joint", SEEDED), ("pd", GREEDY), ("pd_many", GREEDY), ("pd_many", SEEDED)],
)
async def test_answers_are_those_of_one_process(graph: str, sampling: Sampling) -> None:
    async with opened(graph) as session:
        found = await stream_all(session, sampling)
    assert found.tokens == await right(graph, sampling)
    assert set(found.reasons.values()) == {"length"}


@pytest.fixture(params=["tcp", pytest.param("nixl", marks=pytest.mark.soak)])
def links(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Options of an executor whose workers are linked as those of several hosts would be."""
    create_keys(tmp_path / "keys")
    return {
        "executor.address": "tcp://127.0.0.1:0",
        "executor.keys": str(tmp_path / "keys"),
        "executor.kv": request.param,
    }


async def test_answers_over_tcp_are_those_of_one_process(links: dict[str, Any]) -> None:
    async with opened("pd_many", **links) as session:
        found = await stream_all(session, SEEDED)
    assert found.tokens == await right("pd_many", SEEDED)


IN_STEPS = {"p.max_num_batched_tokens": 48, "prefill.max_inflight": 2}


def long_prompts(first: int) -> dict[int, list[int]]:
    """Six prompts without a common prefix, of 19 blocks each."""
    return {n: [n, *((7 * n + k * k) % 251 for k in range(300))] for n in range(first, first + 6)}


@pytest.fixture(params=["memory", "tcp", "nixl"])
def any_kv(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Executor options for each KV transport."""
    create_keys(tmp_path / "keys")
    links: dict[str, Any] = {"executor.kv": request.param}
    if request.param != "memory":
        links |= {"executor.address": "tcp://127.0.0.1:0", "executor.keys": f"{tmp_path}/keys"}
    return links


async def num_early(session: Session) -> int:
    """Blocks so far that came while the rest of their prompt was computed."""
    await session.idle()  # the answer of each worker carries the count
    (load,) = session.statistics().engines["d"]
    assert load.num_damaged_chunks == 0
    return load.num_early_blocks


# A prompt has 301 tokens, and its last step computes at most 48. Before that step, 253 tokens or
# more are computed, which fill 15 blocks.
NUM_EARLY = 15


async def test_blocks_come_while_the_rest_of_their_prompt_is_computed(
    any_kv: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = long_prompts(0), long_prompts(6)
    async with opened("pd", "tasks", **IN_STEPS) as session:
        alone = await stream_all(session, SEEDED, prompts=first | second)
    # A step takes a millisecond, as long as a message to the graph and back: without waiting, any
    # number of blocks may be late.
    monkeypatch.setattr("sagellm.opening.worker_processes.WORKER_MODULE", "stepwise_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    async with opened("pd", **IN_STEPS, **any_kv) as session:
        found = await stream_all(session, SEEDED, prompts=first)
        before = await num_early(session)
        assert before >= NUM_EARLY * len(first)
        others = await stream_all(session, SEEDED, prompts=second)
        assert await num_early(session) - before >= NUM_EARLY * len(second)
    assert found.tokens | others.tokens == alone.tokens
    assert set(alone.reasons.values()) == {"length"}


async def test_workers_killed_behind_tcp_lose_nothing(links: dict[str, Any]) -> None:
    async with opened("pd_many", **links) as session:

        async def kill(streams: Streams) -> None:
            await killed(session, "p[0]", streams, after=3)
            await killed(session, "d[1]", streams, after=20)

        found = await stream_all(session, GREEDY, kill)
    assert found.tokens == await right("pd_many", GREEDY)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"executor.address": "tcp://127.0.0.1:0"}, "links over tcp need keys"),
        ({"executor.address": "tcp://*:1", "executor.keys": "k"}, "neither ipc nor an address"),
        ({"executor.address": "tcp://0.0.0.0:1", "executor.keys": "k"}, "neither ipc nor an"),
        ({"executor.address": "tcp://h:99999", "executor.keys": "k"}, "neither ipc nor an address"),
        ({"executor.address": "udp://h:1"}, "neither ipc nor an address"),
        ({"executor.silent_s": 0.1}, "less than two pings"),
        ({"executor.kv": "rdma"}, "kv"),
    ],
)
async def test_links_that_make_no_sense_are_refused(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(GraphError, match=wrong):
        async with opened("pd", **options):
            pass


async def test_a_transport_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraphError, match="NIXL is not installed"):
        async with opened("pd", **{"executor.kv": "nixl"}):
            pass


@pytest.mark.alone
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("victim", ["d[0]", "p[1]"])
async def test_a_killed_worker_loses_and_repeats_no_token(victim: str, sampling: Sampling) -> None:
    async with opened("pd_many") as session:
        # Those of one decode worker may be over before those of the other begin.
        kill = partial(killed, session, victim, of=max if victim == "d[0]" else min)
        found = await stream_all(session, sampling, kill)
        num_migrated = session.executor.core.recovery.num_migrated
    assert found.tokens == await right("pd_many", sampling)
    assert set(found.reasons.values()) == {"length"}
    assert max(found.gaps_s.values()) < 2.0
    assert (num_migrated > 0) == (victim == "d[0]")  # prefill had handed all over


async def test_a_prefill_worker_killed_at_work_loses_nothing() -> None:
    """The worker dies while it computes, sends, and queues: all prompts are computed again."""
    async with opened("pd_many") as session:
        for first, victim, after_s in ((0, "p[0]", 0.0), (32, "p[1]", 0.02), (64, "p[0]", 0.05)):
            prompts = {n: [*range(n, 140 + n)] for n in range(first, first + 32)}  # none is cached
            await ready(session, victim)

            async def kill(_: Streams, victim: str = victim, after_s: float = after_s) -> None:
                await trio.sleep(after_s)
                pid = worker_of(session, victim).pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)

            found = await stream_all(session, GREEDY, kill, prompts=prompts)
            right = await stream_all(session, GREEDY, prompts=prompts)
            assert found.tokens == right.tokens
            assert set(found.reasons.values()) == {"length"}
        assert deaths(session) == Counter(p=3)


async def test_streams_wait_for_the_only_worker_and_new_requests_do_not() -> None:
    async with opened("joint") as session:
        refused: list[Any] = []

        async def kill(streams: Streams) -> None:
            await killed(session, "g[0]", streams)
            while worker_of(session, "g[0]").state == "ready":  # noqa: ASYNC110
                await trio.sleep(0.001)
            refused.append(await generate(session, "And then", sampling=GREEDY))

        found = await stream_all(session, SEEDED, kill)
        again = await session.generate("And then", sampling=GREEDY)
    assert found.tokens == await right("joint", SEEDED)
    assert (refused[0].finish_reason, refused[0].code) == ("refused", "unavailable")
    assert again.finish_reason in SERVED


async def test_streams_that_have_waited_long_enough_end() -> None:
    held = {"executor.max_hold_s": 0.2}
    async with opened("joint", **held) as session:
        found = await stream_all(session, GREEDY, partial(killed, session, "g[0]"))
    assert set(found.codes.values()) == {"unavailable"}
    assert all(len(tokens) < NUM_TOKENS for tokens in found.tokens.values())


@pytest.mark.alone
async def test_a_frozen_worker_is_given_up_and_says_nothing_twice() -> None:
    quick = {"executor.ping_s": 0.02, "executor.silent_s": 0.8}
    async with opened("pd_many", **quick) as session:

        async def freeze(streams: Streams) -> None:
            pid = worker_of(session, "d[1]").pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)

        found = await stream_all(session, GREEDY, freeze)
    assert found.tokens == await right("pd_many", GREEDY)
    assert max(found.gaps_s.values()) < 2.0


async def test_workers_that_are_killed_one_after_the_other() -> None:
    async with opened("pd_many") as session:

        async def kill(streams: Streams) -> None:
            for after, victim in ((5, "d[0]"), (20, "p[0]"), (40, "d[1]"), (60, "p[1]")):
                await killed(session, victim, streams, after=after)

        found = await stream_all(session, SEEDED, kill)
    assert found.tokens == await right("pd_many", SEEDED)


@pytest.mark.alone
async def test_workers_are_replaced_one_after_the_other_under_load() -> None:
    async with opened("pd_many") as session:
        supervisor = session.supervisor
        assert supervisor is not None
        before = [worker.pid for worker in supervisor.workers]

        async def restart(streams: Streams) -> None:
            await supervisor.restart(supervisor.workers)

        found = await stream_all(session, SEEDED, restart)
        after = [worker.pid for worker in supervisor.workers]
        assert [worker.restarts.count for worker in supervisor.workers] == [0] * 4
    assert found.tokens == await right("pd_many", SEEDED)
    assert max(found.gaps_s.values()) < 2.0
    assert not set(before) & set(after)


@pytest.mark.parametrize("graph", ["joint", "pd_many"])
async def test_a_drained_worker_takes_nothing_new_and_loses_nothing(graph: str) -> None:
    """Streams continue on a sibling; without one they finish on the draining worker."""
    name = {"joint": "g[0]", "pd_many": "d[0]"}[graph]
    async with opened(graph) as session:
        assert session.supervisor is not None
        later: list[Any] = []

        async def drain(streams: Streams) -> None:
            while not (streams.tokens and min(map(len, streams.tokens.values())) >= 10):  # noqa: ASYNC110
                await trio.sleep(0.001)
            session.supervisor.drain(worker_of(session, name))
            later.append(await generate(session, "And then", sampling=GREEDY))

        found = await stream_all(session, GREEDY, drain)
        engine = worker_of(session, name).engine
        assert engine is not None
        assert engine.load.num_running == 0
        await session.supervisor.restart([worker_of(session, name)])
        again = await session.generate("And then", sampling=GREEDY)
    assert found.tokens == await right(graph, GREEDY)
    assert later[0].code == ("unavailable" if graph == "joint" else "")
    assert again.finish_reason in SERVED


async def test_a_sender_that_dies_midway_leaves_no_half_written_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    monkeypatch.setattr("sagellm.opening.worker_processes.WORKER_MODULE", "dying_sender")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv(ORDER, str(order))
    brief = Sampling(max_tokens=20, ignore_eos=True, temperature=1.0, seed=2)
    async with (
        opened("pd_many", "tasks") as undisturbed,
        opened("pd_many", **{"executor.kv": "tcp"}) as session,
    ):
        for first, share in ((20, 0.0), (21, 0.25), (22, 0.5), (23, 0.75), (24, 0.99)):
            prompts = {n: [first, *range(20, 120)] * 4 + [n] for n in range(6)}  # none is cached
            right = await stream_all(undisturbed, brief, prompts=prompts)
            await ready(session, "p[0]", "p[1]")  # either
            before = deaths(session)
            give_order(order, share)
            found = await stream_all(session, brief, prompts=prompts)
            assert not order.exists()
            assert deaths(session) - before == Counter(p=1)
            assert found.tokens == right.tokens


def deaths(session: Session) -> Counter[str]:
    """The workers by engine."""
    assert session.supervisor is not None
    found: Counter[str] = Counter()
    for worker in session.supervisor.workers:
        found[worker.engine_name] += worker.restarts.count
    return found


async def test_replicas_come_and_go_under_load() -> None:
    async with opened("pd_many") as session:
        supervisor = session.supervisor
        assert supervisor is not None

        def there(engine: str) -> list[int]:
            return [one.replica for one in supervisor.workers if one.engine_name == engine]

        async def scale(streams: Streams) -> None:
            while not (streams.tokens and min(map(len, streams.tokens.values())) >= 5):  # noqa: ASYNC110
                await trio.sleep(0.001)
            await supervisor.scale("d", 1)
            assert there("d") == [0]
            await supervisor.scale("d", 3)
            assert there("d") == [0, 1, 2]
            await supervisor.scale("p", 1)

        found = await stream_all(session, SEEDED, scale)
        more = await stream_all(session, GREEDY)
        loads = [session.executor.engines["d"][number].load for number in range(3)]
        assert all(load.num_steps for load in loads)  # the new ones have work, too
        assert len(session.executor.engines["p"]) == 2
        assert there("p") == [0]
    assert found.tokens == await right("pd_many", SEEDED)
    assert more.tokens == await right("pd_many", GREEDY)


async def test_what_was_placed_on_a_replica_that_goes_ends_all_the_same() -> None:
    """Even if the first token is the last, so that no request needs the replica."""
    null = {f"{name}.{key}": "null" for name in "pd" for key in ("model", "device")}
    slow = {**null, "p.prefill_token_s": 0.02, "d.decode_step_s": 0.01}
    one = Sampling(max_tokens=1, ignore_eos=True)
    async with Graph.load("pd_many").open(set=slow, executor="processes") as session:
        answers = []

        async def ask() -> None:
            answers.append(await session.generate(list(range(50)), sampling=one))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(ask)
                await trio.sleep(0.4)
                assert session.supervisor is not None
                await session.supervisor.scale("d", 1)
            await session.idle()
    assert [len(answer.token_ids) for answer in answers] == [1] * 4


async def test_a_replica_that_was_added_may_die_like_any_other() -> None:
    async with opened("pd_many") as session:
        assert session.supervisor is not None
        await session.supervisor.scale("d", 3)
        found = await stream_all(session, SEEDED, partial(killed, session, "d[2]"))
        assert worker_of(session, "d[2]").restarts.count == 1
    assert found.tokens == await right("pd_many", SEEDED)


async def test_replicas_that_nobody_chooses_are_refused() -> None:
    graph = Graph.load("pd")  # `generate` shares d, and has no router before it
    async with graph.open(set=NULL, executor="processes") as session:
        assert session.supervisor is not None
        with pytest.raises(CannotScale, match="op: route"):
            await session.supervisor.scale("d", 2)
        with pytest.raises(CannotScale, match="needs a replica"):
            await session.supervisor.scale("d", 0)
        answer = await session.generate("Once", sampling=GREEDY)
    assert len(answer.token_ids) == NUM_TOKENS


async def test_a_request_that_kills_workers_is_quarantined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sagellm.opening.worker_processes.WORKER_MODULE", "poisoned_worker")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    poison = [POISON, *range(20, 60)]
    async with opened("pd_many") as session:
        prompts = {**dict(enumerate(PROMPTS[:NUM_STREAMS])), NUM_STREAMS: poison}
        found = await stream_all(session, GREEDY, prompts=prompts)
        assert session.supervisor is not None
        num_deaths = sum(worker.restarts.count for worker in session.supervisor.workers)
        again = await generate(session, poison, sampling=GREEDY)
    assert found.codes.pop(NUM_STREAMS) == "request_quarantined"
    assert found.tokens.pop(NUM_STREAMS) == []
    assert found.tokens == await right("pd_many", GREEDY)
    assert num_deaths <= 2
    assert (again.finish_reason, again.code) == ("failed", "request_quarantined")


async def test_cancelled_requests_leave_nothing_in_a_worker() -> None:
    long, first = Sampling(max_tokens=400, ignore_eos=True), 0
    async with opened("pd") as session:
        for after_s in (0.0, 0.005, 0.02, 0.1):
            prompts = dict(enumerate(PROMPTS[first : first + NUM_STREAMS]))
            first += NUM_STREAMS  # none is cached
            with trio.move_on_after(after_s):
                await stream_all(session, long, prompts=prompts)
            with trio.fail_after(5):
                await session.idle()
            assert session.statistics().num_open == 0
            assert num_leased(session) == 0


@pytest.mark.parametrize("kv", [pytest.param("memory", marks=pytest.mark.soak), "tcp"])
async def test_two_hundred_cancels_at_random_points_free_every_block(kv: str) -> None:
    """While queued, while prefilling, while blocks move, while decoding."""
    draw = random.Random(kv)
    answer = Sampling(max_tokens=30, ignore_eos=True)
    async with opened("pd_many", **{"executor.kv": kv}) as session:

        async def ask_and_leave(number: int) -> None:
            prompt = [20 + number % 90, *draw.choices(range(20, 120), k=draw.randint(10, 400))]
            with trio.move_on_after(draw.uniform(0, 0.3)):
                await session.generate(prompt, sampling=answer)

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(ask_and_leave, number)
                await trio.sleep(draw.uniform(0, 0.02))
        with trio.fail_after(10):
            await session.idle()
        assert session.executor.core.ledger.ended["cancelled"] > 20
        canary = await session.generate("Once upon a time", sampling=GREEDY)
        assert session.executor.core.recovery.num_migrated == 0
    assert len(canary.token_ids) == NUM_TOKENS


async def test_a_lambda_stays_in_the_process_of_the_graph() -> None:
    graph = Graph("shout").engine("g", model="sage-tiny", **EXACT)
    graph >> ops.generate(engine="g") >> ops.map(lambda event: event.text.upper())
    async with graph.open(executor="processes") as session:
        answer = await session.generate("Once upon a time", sampling=GREEDY)
    assert answer.text
    assert answer.text == answer.text.upper()


def test_it_works_from_asyncio_and_from_plain_threads() -> None:
    with Graph.load("pd").open(set=NULL, executor="processes") as session:
        answer = session.generate("Once upon a time", sampling=GREEDY)
    assert len(answer.token_ids) == NUM_TOKENS
