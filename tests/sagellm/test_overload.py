"""Ten times more than a graph can serve, in virtual time: bounds, early refusals, goodput."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from endings import generate
from trio.testing import MockClock

from sagellm import Answer, Graph, Sampling, ops
from sagellm.runtime.messages import PRIORITIES, SERVED
from sagellm.session import Session

OBJECTIVE_S = 1.0
CAPACITY = 20.0  # requests a second: 8 at a time, each some 0.4 s
MAX_QUEUED = 200
NULL = {
    "g.device": "null",
    "g.prefill_token_s": 1e-5,
    "g.decode_step_s": 0.02,
    "generate.max_inflight": 8,
    "admission.max_queued": MAX_QUEUED,
    "admission.slo_ttft_s": OBJECTIVE_S,
}

SPLIT = {  # 10 requests a second: a prompt takes the prefill engine some 0.1 s
    "p.device": "null",
    "d.device": "null",
    "p.prefill_token_s": 1e-3,
    "p.decode_step_s": 0.0,
    "d.prefill_token_s": 1e-5,
    "d.decode_step_s": 0.01,
    "admission.max_queued": MAX_QUEUED,
    "admission.slo_ttft_s": 2 * OBJECTIVE_S,
}


@dataclass
class Load:
    """The results of one period of load."""

    seconds: float
    objective_s: float = OBJECTIVE_S
    answers: list[Answer] = field(default_factory=list)
    priorities: dict[str, int] = field(default_factory=dict)
    most_queued: int = 0

    @property
    def ttfts(self) -> list[float]:
        stamps = [answer.stamps for answer in self.answers if answer.finish_reason in SERVED]
        return sorted((stamp.prefilled_s or 0.0) - stamp.arrived_s for stamp in stamps)

    @property
    def goodput(self) -> float:
        """Tokens a second of answers whose first token came in time."""
        good = [
            len(answer.token_ids)
            for answer in self.answers
            if answer.finish_reason in SERVED
            and (answer.stamps.prefilled_s or 0.0) - answer.stamps.arrived_s <= self.objective_s
        ]
        return sum(good) / self.seconds

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.finish_reason == "refused"]

    def ttft_s(self, share: float) -> float:
        return self.ttfts[int(share * len(self.ttfts))]


async def loaded(
    session: Session,
    rate: float,
    seconds: float,
    priorities: Sequence[int] = (2,),
    *,
    num_tokens: tuple[int, int] = (8, 32),
) -> Load:
    """Send Poisson arrivals for a while; returns when all requests have ended."""
    draw = random.Random(rate)
    load = Load(seconds, session.executor.plan.logic["admission"].options.slo_ttft_s)

    async def ask(priority: int) -> None:
        sampling = Sampling(max_tokens=draw.randint(*num_tokens), ignore_eos=True)
        prompt = draw.choices(range(256), k=draw.randint(50, 150))
        answer = await generate(session, prompt, sampling=sampling, priority=priority)
        load.answers.append(answer)
        load.priorities[answer.request_id] = priority

    async with trio.open_nursery() as nursery:
        stop_s = trio.current_time() + seconds
        while trio.current_time() < stop_s:
            nursery.start_soon(ask, draw.choice(priorities))
            await trio.sleep(draw.expovariate(rate))
            waiting = session.executor.core.logic_graph.cells["sort"].state.backlog.num_requests
            load.most_queued = max(load.most_queued, waiting)
    await session.idle()
    session.executor.core.ledger.check()
    pools = session.statistics().engines.values()
    assert all(one.num_leased_blocks == 0 for pool in pools for one in pool)
    return load


async def peak_goodput(graph: str, options: dict[str, object], capacity: float) -> float:
    """A sweep over rates below capacity."""
    peaks = []
    for part in (0.5, 0.8, 1.0):
        async with Graph.load(graph).open(set=options) as session:
            peaks.append((await loaded(session, part * capacity, 10)).goodput)
    return max(peaks)


@pytest.mark.parametrize(
    ("graph", "options", "capacity"),
    [
        pytest.param("joint", NULL, CAPACITY, marks=pytest.mark.soak),
        ("pd", SPLIT, 10.0),
    ],
)
async def test_ten_times_overload_keeps_goodput_and_promises(
    graph: str, options: dict[str, object], capacity: float, autojump_clock: MockClock
) -> None:
    peak = await peak_goodput(graph, options, capacity)
    async with Graph.load(graph).open(set=options) as session:
        await loaded(session, capacity, 5)  # a graph that has served before: there is evidence
        load = await loaded(session, 10 * capacity, 30)
    assert load.most_queued <= MAX_QUEUED
    assert load.goodput >= 0.9 * peak
    assert load.ttft_s(0.99) <= 1.5 * load.objective_s
    assert len(load.refused) > 0.8 * len(load.answers)
    assert {answer.code for answer in load.refused} == {"slo_unreachable"}
    assert all((answer.retry_after_s or 0) > 0 for answer in load.refused)
    assert all(answer.stamps.finished_s == answer.stamps.arrived_s for answer in load.refused)


@pytest.mark.soak
async def test_answers_that_begin_and_end_together_break_no_promise(
    autojump_clock: MockClock,
) -> None:
    """Sixteen answers of four seconds start together: nothing leaves meanwhile."""
    options = {
        "g.device": "null",
        "g.decode_step_s": 0.05,
        "g.max_num_seqs": 16,
        "admission.slo_ttft_s": 2.0,
    }
    async with Graph.load("joint").open(set=options) as session:
        await loaded(session, 40.0, 16, num_tokens=(80, 80))
        load = await loaded(session, 40.0, 80, num_tokens=(80, 80))
    assert load.goodput >= 0.9 * 16 / 0.05
    assert load.ttft_s(0.99) <= 1.5 * load.objective_s


@pytest.mark.parametrize("num_tokens", [(80, 80), (60, 100)])
async def test_nothing_waits_unseen_for_a_place_in_decode(
    num_tokens: tuple[int, int], autojump_clock: MockClock
) -> None:
    """Prompts are computed at once, and decode has places for eight answers of some four seconds:
    the wait is in the queue, where admission and the policy see it.
    """
    options = {**SPLIT, "p.prefill_token_s": 1e-4, "d.decode_step_s": 0.05, "d.max_num_seqs": 8}
    async with Graph.load("pd").open(set=options) as session:
        await loaded(session, 19.0, 20, num_tokens=num_tokens)
        load = await loaded(session, 20.0, 60, num_tokens=num_tokens)
    assert load.goodput >= 0.9 * 8 / 0.05
    assert load.ttft_s(0.99) <= 1.5 * load.objective_s
    since_dispatch = (
        (answer.stamps.prefilled_s or inf) - (answer.stamps.dispatched_s or 0.0)
        for answer in load.answers
        if answer.finish_reason in SERVED
    )
    assert max(since_dispatch) < 0.2  # the time that prefill takes for some prompts at once


async def test_a_graph_that_has_served_nothing_yet_refuses_only_what_does_not_fit(
    autojump_clock: MockClock,
) -> None:
    async with Graph.load("joint").open(set=NULL) as session:
        load = await loaded(session, 2000 * CAPACITY, 0.02)
    assert len(load.answers) > MAX_QUEUED
    assert 0 < load.most_queued <= 0.8 * MAX_QUEUED
    assert {answer.code for answer in load.refused} == {"queue_full"}
    assert len(load.answers) - len(load.refused) >= 0.8 * MAX_QUEUED


async def test_after_a_burst_all_is_as_before(autojump_clock: MockClock) -> None:
    async with Graph.load("joint").open(set=NULL) as session:
        before = await loaded(session, 0.5 * CAPACITY, 10)
        await loaded(session, 10 * CAPACITY, 5)
        after = await loaded(session, 0.5 * CAPACITY, 10)
    assert after.refused == before.refused == []
    assert after.ttft_s(0.5) == pytest.approx(before.ttft_s(0.5), abs=0.04)


async def test_waiting_tokens_are_bounded_too(autojump_clock: MockClock) -> None:
    most = 2000
    options = {**NULL, "admission.slo_ttft_s": 1000.0, "admission.max_queued_tokens": most}
    async with Graph.load("joint").open(set=options) as session:
        seen = []

        async def watch() -> None:
            while True:
                seen.append(
                    session.executor.core.logic_graph.cells["sort"].state.backlog.num_tokens
                )
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            load = await loaded(session, 5 * CAPACITY, 10)
            nursery.cancel_scope.cancel()
    assert 0.5 * most < max(seen) <= most
    assert {answer.code for answer in load.refused} == {"queue_full"}


CRITICAL, BACKGROUND = PRIORITIES["critical"], PRIORITIES["background"]


async def test_critical_requests_are_served_while_others_can_be_shed(
    autojump_clock: MockClock,
) -> None:
    mixed = (CRITICAL, *(BACKGROUND,) * 4)  # critical: three fifths of what can be served
    roomy = {**NULL, "admission.slo_ttft_s": 3 * OBJECTIVE_S}  # chance fills no queue of that size
    async with Graph.load("joint").open(set=roomy) as session:
        await loaded(session, CAPACITY, 5)
        load = await loaded(session, 3 * CAPACITY, 30, mixed)
    assert {load.priorities[answer.request_id] for answer in load.refused} == {BACKGROUND}


async def test_a_critical_request_is_refused_only_where_all_others_are(
    autojump_clock: MockClock,
) -> None:
    async with Graph.load("joint").open(set=NULL) as session:
        await loaded(session, CAPACITY, 5)
        load = await loaded(session, 3 * CAPACITY, 30, (CRITICAL, BACKGROUND))
    arrived: dict[int, list[Answer]] = {CRITICAL: [], BACKGROUND: []}
    for answer in load.answers:
        arrived[load.priorities[answer.request_id]].append(answer)
    refused_s = [one.stamps.arrived_s for one in arrived[CRITICAL] if one.code]
    near = [
        answer
        for answer in arrived[BACKGROUND]
        if any(-0.05 < answer.stamps.arrived_s - second < 0.25 for second in refused_s)
    ]
    assert len(refused_s) > 200
    assert len(near) > 500
    assert {answer.finish_reason for answer in near} == {"refused"}


async def test_a_request_that_misses_its_objective_does_not_starve(
    autojump_clock: MockClock,
) -> None:
    """For a minute, requests with later deadlines keep coming."""
    async with Graph.load("joint").open(set=NULL) as session:
        await loaded(session, CAPACITY, 5)
        load = await loaded(session, 6 * CAPACITY, 60, (CRITICAL, BACKGROUND))
    assert len(load.ttfts) > 1000
    assert load.ttfts[-1] <= 1.5 * OBJECTIVE_S + 0.1


@pytest.mark.parametrize(("policy", "is_served"), [("slo_aware", True), ("fifo", False)])
async def test_requests_that_can_wait_are_not_in_the_way_of_those_that_cannot(
    policy: str, is_served: bool, autojump_clock: MockClock
) -> None:
    """Seven seconds of work without an objective wait; other requests may overtake."""
    options = {**NULL, "sort.policy": policy}
    del options["admission.slo_ttft_s"]
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    async with Graph.load("joint").open(set=options) as session, trio.open_nursery() as nursery:
        for _ in range(150):
            nursery.start_soon(partial(generate, session, [1] * 50, sampling=sampling))
        await trio.sleep(2)
        for _ in range(5):
            answer = await generate(session, [1] * 50, sampling=sampling, slo_ttft_s=OBJECTIVE_S)
            stamps = answer.stamps
            if is_served:
                assert (stamps.prefilled_s or inf) - stamps.arrived_s <= OBJECTIVE_S
            else:
                assert (answer.finish_reason, answer.code) == ("refused", "slo_unreachable")


@pytest.mark.parametrize(
    "before", [(ops.admission(), ops.policy_sort("fifo")), (ops.policy_sort("fifo"),), ()]
)
async def test_a_request_that_will_not_wait_is_refused_at_once(
    before: tuple[Any, ...], autojump_clock: MockClock
) -> None:
    graph = Graph("g").engine("g", model="null", device="null", decode_step_s=0.1)
    for operator in before:
        graph = graph >> operator
    graph = graph >> ops.generate(engine="g", max_inflight=1)

    async with graph.open() as session, trio.open_nursery() as nursery:
        sampling = Sampling(max_tokens=8, ignore_eos=True)
        answer = await generate(session, [1], sampling=sampling, no_queue=True)
        assert answer.finish_reason == "length"
        nursery.start_soon(partial(generate, session, [1], sampling=sampling))
        await trio.sleep(0.05)
        answer = await generate(session, [1], sampling=sampling, no_queue=True)
        assert (answer.finish_reason, answer.code) == ("refused", "would_wait")
        assert answer.stamps.finished_s == answer.stamps.arrived_s
        assert (answer.retry_after_s or 0.0) >= 1
        await session.idle()
        session.executor.core.ledger.check()
