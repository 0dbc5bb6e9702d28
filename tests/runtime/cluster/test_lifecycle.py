"""Workers whose links fail repeatedly, in virtual time: they are ejected, and tried again."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from endings import generate
from logged import logged
from trio.testing import MockClock
from virtual_workers import Chaos, chaotic

from sagellm import Graph, Sampling, ops
from sagellm.gateway.metrics.snapshot import read_engines
from sagellm.runtime.cluster.child_process import RestartPolicy
from sagellm.runtime.cluster.launch import TaskLife
from sagellm.runtime.comm.channel import ChannelClosed

START_S = 2.0  # what loading takes
ONE = Sampling(max_tokens=1)
LONG = Sampling(max_tokens=1000, ignore_eos=True)


def replicated() -> Graph:
    graph = Graph("replicated").engine("g", replicas=2)
    return graph >> ops.route() >> ops.generate(engine="g")


@asynccontextmanager
async def bad_links(chaos: Chaos, *replicas: int) -> AsyncIterator[dict[int, list[float]]]:
    """Cut each link as soon as its worker is ready. Yields the times of the cuts."""
    cut: dict[int, list[float]] = {replica: [] for replica in replicas}

    async def spoil(replica: int) -> None:
        worker = chaos.supervisor.workers[replica]
        while True:
            if worker.is_serving:
                (life,) = (one for one in chaos.lives.lives if one.pid == worker.pid)
                life.channel.close("its checksum is wrong")
                cut[replica].append(trio.current_time())
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        for replica in replicas:
            nursery.start_soon(spoil, replica)
        yield cut
        nursery.cancel_scope.cancel()


def pauses(times: list[float]) -> list[float]:
    return [later - earlier - START_S for earlier, later in pairwise(times)]


async def test_it_is_ejected_after_five_and_probed_after_ten_seconds_then_twenty(
    autojump_clock: MockClock,
) -> None:
    async with chaotic(replicated(), 1) as chaos:
        worker, sibling = chaos.supervisor.workers
        async with bad_links(chaos, 0) as cut:
            await trio.sleep(30)
            assert worker.state == "ejected"
            answer = await chaos.session.generate([1] * 5, sampling=Sampling(max_tokens=3))
            assert answer.finish_reason
            await trio.sleep(100)
        found = pauses(cut[0])
        assert found[:4] == pytest.approx([0.5, 1.0, 2.0, 4.0], rel=0.2, abs=0.2)
        assert found[4:7] == pytest.approx([10.0, 20.0, 30.0], abs=0.2)
        assert sibling.restarts.count == 0
        await trio.sleep(60)  # the link is good again
        assert worker.is_serving


async def test_no_more_than_half_are_ejected(autojump_clock: MockClock) -> None:
    async with chaotic(replicated(), 1) as chaos:
        async with bad_links(chaos, 0, 1):
            for _ in range(1000):
                states = [worker.state for worker in chaos.supervisor.workers]
                assert states.count("ejected") <= 1
                assert "failed" not in states
                await trio.sleep(0.1)
            assert sum(worker.restarts.count for worker in chaos.supervisor.workers) > 10
        await trio.sleep(100)
        assert all(worker.is_serving for worker in chaos.supervisor.workers)


@pytest.mark.parametrize("is_lost", [True, False], ids=["dies", "is drained"])
async def test_it_is_back_at_once_where_its_sibling_is_gone(
    is_lost: bool, autojump_clock: MockClock
) -> None:
    async with chaotic(replicated(), 1, policy=RestartPolicy(most=0)) as chaos:
        worker, sibling = chaos.supervisor.workers
        async with bad_links(chaos, 0):
            await trio.sleep(20)
        assert worker.state == "ejected"
        if is_lost:
            next(life for life in chaos.lives.lives if life.pid == sibling.pid).kill()
        else:
            chaos.supervisor.drain(sibling)
        await trio.sleep(START_S + 0.1)
        assert worker.is_serving
        assert sibling.state == ("starting" if is_lost else "drained")
        assert sibling.restarts.is_failing == is_lost


async def test_where_nobody_else_serves_it_is_not_ejected(autojump_clock: MockClock) -> None:
    async with chaotic(replicated(), 1) as chaos:
        worker, sibling = chaos.supervisor.workers
        chaos.supervisor.drain(sibling)
        async with bad_links(chaos, 0):
            for _ in range(1000):
                assert worker.state != "ejected"
                await trio.sleep(0.1)


async def serving_life(chaos: Chaos) -> TaskLife:
    """The life of the worker with a request that has no token yet."""
    while True:
        for worker in chaos.supervisor.workers:
            if worker.engine is not None and worker.engine._silent:
                return next(life for life in chaos.lives.lives if life.pid == worker.pid)
        await trio.sleep(0.01)


@pytest.mark.parametrize("side", ["of the graph", "of the worker"])
async def test_a_damaged_link_is_not_the_fault_of_a_request(
    side: str, autojump_clock: MockClock
) -> None:
    """This holds even for a request that was in a worker that died before."""
    async with chaotic(replicated(), 1) as chaos, trio.open_nursery() as nursery:
        answers = []

        @nursery.start_soon
        async def ask() -> None:
            answers.append(await generate(chaos.session, [1] * 500, sampling=ONE))

        (await serving_life(chaos)).kill()
        await trio.sleep(0.1)
        life = await serving_life(chaos)
        (life.channel if side == "of the graph" else life.channel._peer).close("it is damaged")
    assert [answer.finish_reason for answer in answers] == ["length"]


async def test_a_restart_over_a_link_that_stays_bad_comes_to_an_end(
    autojump_clock: MockClock,
) -> None:
    async with chaotic(replicated(), 1) as chaos, bad_links(chaos, 0):
        await trio.sleep(20)
        with trio.fail_after(60):
            await chaos.supervisor.restart(chaos.supervisor.workers)
        assert chaos.supervisor.workers[1].is_serving


async def test_a_crash_that_takes_its_time_is_no_bad_link(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is silent while it dumps core, for example, and then ends by its own signal."""
    wait = TaskLife.wait

    async def dumped(self: TaskLife) -> int:
        await wait(self)
        return -signal.SIGSEGV

    monkeypatch.setattr(TaskLife, "wait", dumped)
    async with chaotic(replicated(), 1, policy=RestartPolicy(most=2)) as chaos:
        async with bad_links(chaos, 0):
            await trio.sleep(60)
        worker = chaos.supervisor.workers[0]
        assert worker.restarts.is_failing
        assert worker.ended == "signal 11"
        assert set(worker.restarts.deaths) == {"machine"}


async def test_a_worker_that_is_restarted_by_hand_waits_no_longer(
    autojump_clock: MockClock,
) -> None:
    async with chaotic(replicated(), 1) as chaos:
        worker = chaos.supervisor.workers[0]
        async with bad_links(chaos, 0):
            await trio.sleep(30)
            assert worker.state == "ejected"
        began_s = trio.current_time()
        await chaos.supervisor.restart([worker])
        assert worker.is_serving
        assert trio.current_time() - began_s < START_S + 5


def kill(chaos: Chaos, replica: int = 0) -> None:
    worker = chaos.supervisor.workers[replica]
    next(life for life in chaos.lives.lives if life.pid == worker.pid).kill()


async def ready(chaos: Chaos, replica: int = 0) -> None:
    while not chaos.supervisor.workers[replica].is_serving:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_a_worker_that_dies_again_and_again_is_tried_for_ever(
    autojump_clock: MockClock,
) -> None:
    async with chaotic(Graph.load("joint"), 1, policy=RestartPolicy()) as chaos:
        (worker,) = chaos.supervisor.workers
        died_s = []
        with logged() as lines:
            for _ in range(12):
                await ready(chaos)
                kill(chaos)
                died_s.append(trio.current_time())
                await trio.sleep(0.01)
                assert chaos.session.health().missing
        expected = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0, 30.0]
        assert pauses(died_s) == pytest.approx(expected, rel=0.2, abs=0.2)
        assert worker.state == "failing"
        said = "engine g has no worker: g[0] dies again and again, and is tried again"
        assert chaos.session.health().missing == said
        deaths = [line for line in lines if line["event"] == "worker_died"]
        assert [line["is_failing"] for line in deaths] == [False] * 5 + [True] * 7
        assert [line["num_deaths"] for line in deaths] == list(range(1, 13))
        (shown,) = read_engines(chaos.session.executor, chaos.supervisor.workers)
        assert (shown.is_failing, shown.is_up) == (True, False)
        assert shown.deaths == {"machine": 12, "request": 0, "link": 0}
        await ready(chaos)
        assert chaos.session.health().missing == ""
        assert (await generate(chaos.session, [1] * 5, sampling=ONE)).finish_reason == "length"
        assert worker.restarts.is_failing
        await trio.sleep(65)
        assert not worker.restarts.is_failing


async def test_deaths_of_a_request_are_told_from_those_of_the_machine(
    autojump_clock: MockClock,
) -> None:
    """A prompt that was in two workers when they died counts as the cause."""
    async with chaotic(Graph.load("joint"), 1, policy=RestartPolicy()) as chaos:
        (worker,) = chaos.supervisor.workers
        assert (await generate(chaos.session, [1] * 5, sampling=ONE)).finish_reason == "length"

        async def ask_and_kill_twice() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect, "request_quarantined")
                for _ in range(2):
                    await ready(chaos)
                    await trio.sleep(0.5)  # of the two seconds that its prompt takes
                    kill(chaos)
                    await trio.sleep(0.01)
            await ready(chaos)

        async def expect(code: str) -> None:
            prompt[0] += 1
            answer = await generate(chaos.session, prompt, sampling=LONG)
            assert answer.code == code

        prompt = [1] * 2000
        await ask_and_kill_twice()
        assert worker.restarts.deaths == {"machine": 1, "request": 1}
        await ask_and_kill_twice()  # no token was emitted in between: any request may be the cause
        assert worker.restarts.deaths == {"machine": 3, "request": 1}
        assert (await generate(chaos.session, [1] * 5, sampling=ONE)).finish_reason == "length"
        kill(chaos)
        await trio.sleep(0.01)
        assert worker.restarts.deaths == {"machine": 4, "request": 1}


async def test_an_engine_that_requests_can_avoid_needs_no_worker(autojump_clock: MockClock) -> None:
    """Without prefill, long prompts go to the decode engine; without decode, no prompt can
    go on.
    """
    async with chaotic(Graph.load("pd"), 1, policy=RestartPolicy()) as chaos:
        prefill, decode = chaos.supervisor.workers
        chaos.supervisor.drain(prefill)
        await trio.sleep(0.01)
        assert chaos.supervisor.missing == {"p": "engine p has no worker: p[0] is drained"}
        assert chaos.session.health().missing == ""
        answer = await generate(chaos.session, [1] * 50, sampling=ONE)
        assert answer.finish_reason == "length"
        kill(chaos, 1)
        await trio.sleep(0.01)
        said = "engine d has no worker: d[0] is started again"
        assert chaos.session.health().missing == said
        await ready(chaos, 1)
        assert chaos.session.health().missing == ""
        assert decode.is_serving


@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.6, 2.75], ids=str)
async def test_a_restart_that_a_drain_overtakes_comes_to_an_end(
    after_s: float, autojump_clock: MockClock
) -> None:
    """The worker is drained in the end, if the drain comes while it stops, starts or is ready."""
    async with chaotic(replicated(), 1) as chaos:
        workers = chaos.supervisor.workers

        async def drain() -> None:
            await trio.sleep(after_s)
            chaos.supervisor.drain(workers[0])

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(chaos.supervisor.restart, workers)
                nursery.start_soon(drain)
        assert [worker.state for worker in workers] == ["drained", "ready"]
        assert [worker.epoch for worker in workers] == [2, 2]
        await chaos.supervisor.restart(workers[:1])
        assert workers[0].is_serving


async def test_a_restart_whose_new_life_fails_comes_to_an_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chaotic(replicated(), 1, policy=RestartPolicy()) as chaos:

        async def broken(*_: object) -> None:
            raise ChannelClosed("it cannot")

        before = chaos.lives._open_engine
        monkeypatch.setattr(chaos.lives, "_open_engine", broken)
        with trio.fail_after(60):
            await chaos.supervisor.restart(chaos.supervisor.workers[:1])
        assert chaos.supervisor.workers[0].state == "dead"
        assert chaos.supervisor.workers[0].ended
        monkeypatch.setattr(chaos.lives, "_open_engine", before)
        await ready(chaos)
