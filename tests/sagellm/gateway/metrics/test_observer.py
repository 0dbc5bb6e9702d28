"""The session's observer: what it counts equals the ledger, and no client makes a label."""

import random
from contextlib import suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sagellm import Graph, RequestFailed, RequestRefused, Sampling, ops
from sagellm.gateway.metrics.meters import Counts
from sagellm.gateway.metrics.observer import KVShape, RequestObserver
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import (
    Answer,
    Forked,
    Request,
    Stamps,
    TokenEvent,
    refusal,
)
from sagellm.session import Session

NULL = {
    f"{engine}.{option}": value
    for engine in ("p", "d")
    for option, value in {
        "device": "null",
        "prefill_token_s": 1e-4,
        "decode_step_s": 0.01,
        "kv_bytes_per_s": 1e8,
        "num_blocks": 512,
        "max_model_len": 1024,
    }.items()
}
MODELS = {"": "m", "m": "m", "alias": "m"}


def observe(session: Session) -> RequestObserver:
    observer = RequestObserver(
        session.executor.now, MODELS, (1, 10, 100, 1000), KVShape(LeaseShape(16), 64)
    )
    session.observers.append(observer)
    return observer


@pytest.mark.parametrize("graph", ["pd", "pd_many"])
async def test_counters_equal_the_ledger(graph: str, autojump_clock: MockClock) -> None:
    """Served, cancelled in every phase, refused, expired, and with several choices."""
    draw, tokens = random.Random(graph), random.Random(1)
    async with Graph.load(graph).open(set={**NULL, "admission.max_queued": 30}) as session:
        observer = observe(session)

        async def ask() -> None:
            sampling = Sampling(
                max_tokens=draw.randint(1, 30), n=draw.randint(1, 3), ignore_eos=True
            )
            prompt = tokens.choices(range(256), k=draw.randint(1, 300))
            fields: dict[str, Any] = {"model": draw.choice(["m", "alias", "other"])}
            if draw.random() < 0.2:
                fields["timeout_s"] = draw.uniform(0.001, 0.5)
            with trio.move_on_after(draw.choice([0.001, 0.1, 0.5, 1000])):
                with suppress(RequestRefused, RequestFailed):
                    await session.generate_all(prompt, sampling=sampling, **fields)

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(ask)
                await trio.sleep(draw.expovariate(150))
        await session.idle()
        ledger, counts = session.executor.core.ledger, observer.snapshot()
        ledger.check()
        assert min(ledger.ended[reason] for reason in ("length", "cancelled", "refused", "expired"))
        assert total(counts, "num_accepted") == ledger.num_accepted
        assert total(counts, "generation_tokens") == ledger.num_tokens
        assert ended(counts) == ledger.ended
        assert set(counts) == {"m", "unknown"}
        assert sum(c.e2e.num_samples for c in counts.values()) == ledger.num_accepted
        rejected = sum(sum(c.rejected.values()) for c in counts.values())
        assert rejected == ledger.ended["refused"]
        assert no_time_is_negative(counts)
        assert not observer.num_open


def total(counts: dict[str, Counts], name: str) -> int:
    return sum(getattr(each, name) for each in counts.values())


def ended(counts: dict[str, Counts]) -> dict[str, int]:
    reasons = {reason for each in counts.values() for reason in each.ended}
    return {reason: sum(c.ended.get(reason, 0) for c in counts.values()) for reason in reasons}


def no_time_is_negative(counts: dict[str, Counts]) -> bool:
    names = ("ttft", "itl", "tpot", "e2e", "queue", "inference", "prefill", "decode")
    return all(getattr(each, name).total >= 0 for each in counts.values() for name in names)


async def test_choices_that_a_flat_map_made_are_counted(autojump_clock: MockClock) -> None:
    def twice(request: Request) -> list[str]:
        return [request.prompt] * 2

    graph = Graph("g").engine("g", device="null") >> ops.flat_map(twice) >> ops.generate(engine="g")
    async with graph.open() as session:
        observer = observe(session)
        await session.generate_all("hello", sampling=Sampling(max_tokens=3, ignore_eos=True))
        await session.idle()
        counts = observer.snapshot()["m"]
        assert counts.num_accepted == session.executor.core.ledger.num_accepted == 2
        assert counts.ended == session.executor.core.ledger.ended
        assert not observer.num_open


async def test_whole_answers_are_counted(autojump_clock: MockClock) -> None:
    graph = Graph("g").engine("g", device="null") >> ops.generate(engine="g") >> ops.collect()
    async with graph.open() as session:
        observer = observe(session)
        await session.generate([1] * 10, sampling=Sampling(max_tokens=4, ignore_eos=True))
        counts = observer.snapshot()["m"]
    assert (counts.generation_tokens, counts.prompt_tokens) == (4, 10)
    assert counts.ended == {"length": 1}
    assert counts.ttft.num_samples == 1


class Driven:
    """An observer on a clock that the test holds."""

    def __init__(self, slo_ttft_s: float | None = None) -> None:
        self.now = 0.0
        self.observer = RequestObserver(
            lambda: self.now, MODELS, (1, 10, 100), KVShape(LeaseShape(16), 64), slo_ttft_s
        )

    @property
    def counts(self) -> Counts:
        return self.observer.snapshot()["m"]

    def submit(self, num_choices: int = 1, **fields: Any) -> None:
        self.observer.submitted(
            [Request(request_id="r", choice=number, **fields) for number in range(num_choices)]
        )

    def tokens(self, at: float, num: int = 1, **fields: Any) -> None:
        self.now = at
        stamps = Stamps(started_s=0.5, prefilled_s=1.0, transferred_s=1.25)
        known = {"stamps": stamps, "num_prompt_tokens": 20, "token_ids": (1,) * num}
        self.observer.delivered(TokenEvent(request_id="r", **{**known, **fields}))


@pytest.fixture
def driven() -> Driven:
    return Driven()


def test_preemptions_of_two_engines_add_up(driven: Driven) -> None:
    driven.submit()
    driven.tokens(1.0, num_preemptions=2)
    driven.tokens(2.0, num_preemptions=1)  # another engine, which counts from zero
    driven.tokens(3.0, epoch=1, num_preemptions=1)  # and one more, after that was lost
    driven.tokens(4.0, epoch=1, num_preemptions=1, finish_reason="stop")
    assert driven.counts.num_preemptions.total == 4
    assert driven.counts.num_preemptions.num_samples == 1


def test_latencies_are_those_of_the_deliveries(driven: Driven) -> None:
    driven.submit()
    driven.tokens(2.0)
    driven.tokens(3.0, 2)
    driven.tokens(5.0, finish_reason="stop", num_cached_tokens=16)
    counts = driven.counts
    assert (counts.ttft.total, counts.itl.total, counts.itl.num_samples) == (2.0, 3.0, 2)
    assert counts.tpot.total == 1.0  # three seconds for three tokens after the first
    assert counts.e2e.total == 5.0
    assert counts.generation_len.total == counts.generation_tokens == 4
    assert counts.computed_len.total == 4


def test_phases_are_those_of_the_stamps(driven: Driven) -> None:
    driven.submit()
    driven.tokens(2.0)
    driven.tokens(5.0, finish_reason="stop")
    phases = {name: buckets.total for name, buckets in driven.counts.phases.items()}
    assert phases == {"queue": 0.5, "prefill": 0.5, "transfer": 0.25, "decode": 3.75}
    assert driven.counts.inference.total == 4.5
    assert driven.counts.kv_transfer_bytes == 128  # twenty tokens are two blocks


def test_a_request_that_ended_in_the_queue_was_in_no_engine(driven: Driven) -> None:
    driven.submit()
    driven.now = 3.0
    request = Request(request_id="r")
    driven.observer.delivered(refusal(request, "refused", now=3.0, code="queue_full"))
    counts = driven.counts
    assert counts.phases["queue"].total == 3.0
    assert counts.phases["prefill"].num_samples == counts.queue.num_samples == 0
    assert counts.rejected == {("queue_full", "normal"): 1}
    assert counts.generation_len.num_samples == 0


def test_an_end_from_outside_the_engine_keeps_its_stamps(driven: Driven) -> None:
    driven.submit()
    driven.tokens(2.0)
    driven.tokens(4.0, 0, finish_reason="failed", stamps=Stamps())
    assert driven.counts.phases["decode"].total == 2.75


def test_goodput_is_what_came_in_time(driven: Driven) -> None:
    for slo, at, reason in ((1.0, 0.9, "stop"), (1.0, 1.1, "stop"), (None, 9.0, "cancelled")):
        driven.submit(slo_ttft_s=slo)
        driven.tokens(at, 5, finish_reason=reason)
    assert driven.counts.goodput_tokens == 5
    assert driven.counts.generation_tokens == 15


def test_the_graphs_objective_is_that_of_requests_without_one() -> None:
    driven = Driven(slo_ttft_s=1.0)
    for slo, at in ((None, 0.9), (None, 1.1), (2.0, 1.1)):
        driven.submit(slo_ttft_s=slo)
        driven.tokens(at, 5, finish_reason="stop")
    assert driven.counts.goodput_tokens == 10


def test_the_longest_choice_is_that_of_the_request(driven: Driven) -> None:
    driven.submit(num_choices=2)
    driven.tokens(1.0, 3, choice=0, finish_reason="stop")
    assert driven.counts.longest_len.num_samples == 0
    driven.tokens(1.0, 7, choice=1, finish_reason="stop")
    assert driven.counts.longest_len.total == 7
    assert driven.counts.num_choices.total == 2


def test_labels_come_from_the_table_only() -> None:
    observer = RequestObserver(lambda: 0.0, MODELS, (1,), KVShape())
    for number in range(1000):
        observer.submitted([Request(request_id=f"{number}", model=f'x"}} {number}\n')])
        last = TokenEvent(request_id=f"{number}", finish_reason="refused", code=f"code {number}")
        observer.delivered(last)
    counts = observer.snapshot()
    assert set(counts) == {"m", "unknown"}
    assert counts["unknown"].rejected == {("other", "normal"): 1000}


def test_what_was_never_submitted_is_not_counted(driven: Driven) -> None:
    driven.tokens(1.0, finish_reason="stop")
    driven.observer.delivered(Forked(request_id="r", num_choices=2))
    driven.observer.delivered(Answer(request_id="r"))
    assert driven.counts.generation_tokens == 0
    assert driven.counts.ended == {}


def test_the_gateways_own_probes_are_not_counted(driven: Driven) -> None:
    driven.submit(user_id="probe")
    driven.tokens(1.0, finish_reason="stop")
    assert driven.counts.num_accepted == driven.counts.generation_tokens == 0


def test_a_snapshot_changes_no_more(driven: Driven) -> None:
    driven.submit()
    before = driven.counts
    driven.tokens(1.0, finish_reason="stop")
    assert (before.ended, before.ttft.num_samples, before.phases["queue"].num_samples) == ({}, 0, 0)
