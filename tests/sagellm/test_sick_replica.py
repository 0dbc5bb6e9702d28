"""A replica whose engine always fails: requests move to its sibling, and it is ejected."""

import dataclasses
from typing import Any

import pytest
import trio
from endings import generate
from msgspec.structs import replace
from trio.testing import MockClock

from sagellm import Graph, Sampling, ops
from sagellm.runtime.core.outliers import FIRST_S
from sagellm.runtime.engine.kinds.modelled import ModelledLaunch
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.messages import TokenEvent
from sagellm.session import Session

FIVE = Sampling(max_tokens=5, ignore_eos=True)
NULL = {"model": "null", "device": "null"}


def routed(num_replicas: int) -> Graph:
    graph = Graph("g").engine("g", **NULL, replicas=num_replicas)
    return graph >> ops.policy_sort() >> ops.route() >> ops.generate(engine="g")


@pytest.fixture
def sicken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turn the logits of one replica into NaN, from some token of each answer on."""
    result = ModelledLaunch.result

    def sicken(session: Session, number: int, *, from_token: int = 0) -> None:
        engine: Any = session.executor.engines["g"][number]

        async def poisoned(launch: Any) -> Any:
            sampled = await result(launch)
            sampling = launch.batch.sampling
            if not any(one.mailbox in engine._loop.mailboxes.values() for one in sampling):
                return sampled
            rows = (row for row, one in enumerate(sampling) if one.num_output >= from_token)
            return dataclasses.replace(sampled, broken=frozenset(rows))

        monkeypatch.setattr(ModelledLaunch, "result", poisoned)

    return sicken


async def test_a_request_is_tried_on_the_sibling(sicken: Any, autojump_clock: MockClock) -> None:
    async with routed(2).open() as session:
        sicken(session, 0)
        answers = [await generate(session, [1, 2, 3], sampling=FIVE) for _ in range(20)]
        assert {answer.finish_reason for answer in answers} == {"length"}
        assert len({answer.token_ids for answer in answers}) > 0


async def test_what_was_emitted_is_not_lost(sicken: Any, autojump_clock: MockClock) -> None:
    """A seed gives the same tokens, whichever replica samples them."""
    seeded = Sampling(max_tokens=9, ignore_eos=True, temperature=1.0, seed=3)
    async with routed(2).open() as session:
        right = await generate(session, [1, 2, 3], sampling=seeded)
        sicken(session, 0, from_token=4)
        for _ in range(4):
            answer = await generate(session, [1, 2, 3], sampling=seeded)
            assert answer.token_ids == right.token_ids


async def test_it_is_ejected_and_tried_again(
    sicken: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with routed(2).open() as session:
        sicken(session, 0)
        for _ in range(30):
            await generate(session, [1, 2, 3], sampling=FIVE)
        outliers = session.executor.core.outliers
        assert outliers.is_ejected(("g", 0))
        assert outliers.next_end_s - session.executor.now() <= FIRST_S
        assert caplog.text.count("replica_ejected") == 1
        failures = [line for line in caplog.text.splitlines() if "engine_failed" in line]
        assert len(failures) == 5
        assert "not finite" in failures[0]
        assert "req-0" in failures[0]


async def test_one_replica_alone_fails_its_requests_with_the_cause(
    sicken: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with routed(1).open() as session:
        sicken(session, 0)
        answer = await generate(session, [1, 2, 3], sampling=FIVE)
        assert (answer.finish_reason, answer.code) == ("failed", "engine_failed")
        assert "not finite" in (answer.error or "")
        assert not session.executor.core.outliers.is_ejected(("g", 0))
        await session.idle()
        session.executor.core.ledger.check()
    assert "engine_failed" in caplog.text


async def test_a_request_that_every_replica_fails_on_ends(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    result = ModelledLaunch.result

    async def poisoned(launch: Any) -> Any:
        sampled = await result(launch)
        rows = frozenset(range(len(launch.batch.sampling)))
        return dataclasses.replace(sampled, broken=rows)

    monkeypatch.setattr(ModelledLaunch, "result", poisoned)
    async with routed(4).open() as session:
        answer = await generate(session, [1, 2, 3], sampling=FIVE)
        assert answer.code == "engine_failed"
        await session.idle()
        session.executor.core.ledger.check()


async def test_tokens_of_the_step_that_failed_are_kept(autojump_clock: MockClock) -> None:
    """With drafts, a step may sample tokens before it meets NaN logits."""
    long = Sampling(max_tokens=30, ignore_eos=True, seed=5)
    async with routed(2).open() as session, trio.open_nursery() as nursery:
        right = await generate(session, [1, 2, 3], sampling=long)
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await generate(session, [1, 2, 3], sampling=long, request_id="r"))

        nursery.start_soon(ask)
        engines: Any = session.executor.engines["g"]
        await trio.sleep(0.1)  # some steps of virtual time
        (sequence,) = [one for engine in engines for one in engine._loop.sequences.values()]
        start, key = sequence.num_output, sequence.state
        assert 0 < start < 28
        token_ids = right.token_ids[start : start + 2]
        token = TokenEvent(request_id="r", epoch=key.epoch, position=start, token_ids=token_ids)
        end = replace(token, position=start + 2, token_ids=(), finish_reason="failed")
        sequence.mailbox.post(token)
        sequence.mailbox.post(replace(end, code="engine_failed"))
        sequence.mailbox.flush()
        sequence.mailbox = Mailbox(lambda: None)  # an engine that failed says nothing more
        engine = next(one for one in engines if sequence in one._loop.sequences.values())
        engine.cancel("r", 0, key.epoch)
    assert answers[0].token_ids == right.token_ids
    session.executor.core.ledger.check()


async def test_a_replica_alone_that_always_fails_costs_no_memory(
    sicken: Any, autojump_clock: MockClock
) -> None:
    async with routed(1).open() as session:
        sicken(session, 0)
        for _ in range(60):
            await generate(session, [1, 2, 3], sampling=FIVE)
        (record,) = session.executor.core.outliers._records.values()
        assert len(record.peers) <= 20
