"""Errors in other hooks of a user's service operator: signals, events, cleaning."""

import asyncio
import sys
from typing import Any

import pytest
import trio
from logged import logged
from own_graph import own_generate_graph, own_graph
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm import RequestFailed, Sampling
from sagellm.operators.generate import GenerateService
from sagellm.runtime.messages import Item
from sagellm.runtime.operator import Arrival, Context, Credit, Draw, Emit, Input, Signal, Step
from sagellm.runtime.port import EngineFacts, Lost

LONG = Sampling(max_tokens=100_000, ignore_eos=True)
FIVE = Sampling(max_tokens=5, ignore_eos=True)


class Own:
    """A service operator whose hooks raise; with `holds`, it keeps the requests `kept...`."""

    concurrency = 1

    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds

    def capacity(self, facts: EngineFacts | None) -> Credit:
        return Credit(requests=4)

    async def on_item(self, ctx: Context, item: Item) -> None:
        if item.request_id.startswith("slow"):
            await trio.sleep_forever()
        if not item.request_id.startswith("kept"):
            await ctx.emit(item)
            ctx.release(item.key)

    async def on_events(self, ctx: Context, events: Any) -> None: ...

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        raise KeyError(signal.request_id)

    def recall(self, ctx: Context, key: Any) -> None: ...

    def discard(self, ctx: Context, item: Item) -> None:
        raise LookupError(item.request_id)


def faults(lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    found = [line for line in lines if line["event"] == "operator_failed"]
    assert all(f"{__file__}:" in line["at"] for line in found)
    return [(line["node"], line["request_id"], line["error"]) for line in found]


@pytest.mark.parametrize("name", ["slow", "kept"])
async def test_a_hook_that_raises_at_a_timeout_ends_its_request_and_no_other(
    name: str, autojump_clock: MockClock
) -> None:
    with logged() as lines:
        async with own_graph(Own(holds=name == "kept")) as session:
            late = await session.generate([1], sampling=FIVE, request_id=name, timeout_s=5)
            assert late.finish_reason == "expired"
            assert (await session.generate([1], sampling=FIVE)).finish_reason == "length"
            await session.idle()
            session.executor.core.ledger.check()
    found = faults(lines)
    assert ("policy_sort", name, "KeyError") in found
    assert (("policy_sort", "slow", "LookupError") in found) == (name == "slow")


async def test_a_cancel_reaches_the_operators_after_one_that_raises(
    autojump_clock: MockClock,
) -> None:
    async with own_graph(Own()) as session:
        with trio.move_on_after(0.01):
            await session.generate([1], sampling=LONG, request_id="r")
        await wait_all_tasks_blocked()
        await session.idle()
        assert session.executor.core.ledger.ended["cancelled"] == 1


# ---- an operator with an engine ---------------------------------------------------------------


class OwnGenerate(GenerateService):
    """Raises for the engine's events of the request `bad`, and for the loss of its engine."""

    async def on_events(self, ctx: Context, events: Any) -> None:
        if any(event.request_id == "bad" for event in events):
            raise KeyError("events")
        await super().on_events(ctx, events)

    def recall(self, ctx: Context, key: tuple[str, int]) -> Any:
        raise LookupError(key[0])


async def test_events_that_an_operator_fails_on_end_their_requests_alone(
    autojump_clock: MockClock,
) -> None:
    with logged() as lines:
        async with own_generate_graph(lambda options, setup: OwnGenerate(options)) as session:
            with pytest.raises(RequestFailed, match="generate: the operator raised KeyError"):
                await session.generate([1], sampling=FIVE, request_id="bad")
            assert (await session.generate([1], sampling=FIVE)).finish_reason == "length"
            await session.idle()
            session.executor.core.ledger.check()
    assert faults(lines) == [("generate", "bad", "KeyError")]


async def test_an_operator_that_cannot_recall_what_its_engine_lost_fails_it(
    autojump_clock: MockClock,
) -> None:
    async with (
        own_generate_graph(lambda options, setup: OwnGenerate(options)) as session,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(RequestFailed, match="generate: the operator raised LookupError"):
                await session.generate([1], sampling=LONG, request_id="r")

        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        (engine,) = session.executor.all_engines
        mailbox: Any = engine.events("generate")
        mailbox.post(Lost(request_id="r", choice=0, epoch=0, cause="death"))
        engine.cancel("r", 0, 0)
        mailbox.flush()


class Leaves:
    """A logic operator that leaves its program."""

    initial = None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        if isinstance(happened, Arrival) and happened.item.request_id == "bad":
            sys.exit(3)
        return Step(None, (Emit(happened.item),) if isinstance(happened, Arrival) else ())


class Cancelled(Own):
    async def on_item(self, ctx: Context, item: Item) -> None:
        if item.request_id == "bad":
            raise asyncio.CancelledError
        await ctx.emit(item)
        ctx.release(item.key)


@pytest.mark.parametrize(
    ("operator", "says"),
    [(Leaves(), "raised SystemExit: 3"), (Cancelled(), "raised CancelledError")],
    ids=["logic", "service"],
)
async def test_an_operator_cannot_end_the_graph(
    operator: Any, says: str, autojump_clock: MockClock
) -> None:
    async with own_graph(operator) as session:
        with pytest.raises(RequestFailed, match=says):
            await session.generate([1], sampling=FIVE, request_id="bad")
        assert len((await session.generate([1], sampling=FIVE)).token_ids) == 5


class LeavesAtSignals(Own):
    def on_signal(self, ctx: Context, signal: Signal) -> None:
        sys.exit(3)

    def discard(self, ctx: Context, item: Item) -> None:
        raise asyncio.CancelledError


@pytest.mark.parametrize("name", ["slow", "kept"])
async def test_a_hook_cannot_end_the_graph(name: str, autojump_clock: MockClock) -> None:
    async with own_graph(LeavesAtSignals(holds=name == "kept")) as session:
        await session.generate([1], sampling=FIVE, request_id=name, timeout_s=1.0)
        assert len((await session.generate([1], sampling=FIVE)).token_ids) == 5
