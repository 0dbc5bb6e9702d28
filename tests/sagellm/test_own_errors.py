"""Errors of a user's own code: the exception for the caller, and the log line."""

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from logged import logged
from own_graph import NULL, own_graph
from trio.testing import MockClock

from sagellm import Graph, RequestFailed, RequestRefused, Sampling, ops
from sagellm.operators import route
from sagellm.operators.routing import Candidates
from sagellm.runtime.messages import Item, Request, TokenEvent, refusal
from sagellm.runtime.operator import Arrival, Context, Credit, Emit, Step, Terminate
from sagellm.runtime.port import EngineFacts
from sagellm.session import Session

HERE = Path(__file__)
FIVE = Sampling(max_tokens=5, ignore_eos=True)


def line_of(code: str) -> str:
    """file:line of the one line here that ends with `# code`."""
    lines = HERE.read_text().splitlines()
    (number,) = [at for at, line in enumerate(lines, 1) if line.endswith(f"# {code}")]
    return f"{HERE}:{number}"


def fails(item: Any) -> Any:
    return json.loads("{" + item.request_id)  # raises here


async def fails_later(item: Any) -> Any:
    return json.loads("{" + item.request_id)  # raises later


def none(item: Any) -> Any:  # returns none
    return None


async def pending(item: Any) -> Any:
    return item


@asynccontextmanager
async def opened(*before: Any, after: tuple[Any, ...] = ()) -> AsyncIterator[Session]:
    graph = Graph("g").engine("g", **NULL)
    for operator in (*before, ops.generate(engine="g"), *after):
        graph >> operator
    async with graph.open() as session:
        yield session
        await session.idle()
        session.executor.core.ledger.check()


@pytest.mark.parametrize(
    ("make", "node"),
    [
        (lambda: ops.map(fails), "map"),
        (lambda: ops.filter(fails), "filter"),
        (lambda: ops.flat_map(fails), "flat_map"),
        (lambda: ops.key_by(fails), "key_by"),
        (lambda: ops.policy_sort("own", function=fails), "policy_sort"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
async def test_a_function_that_raises_is_named_with_text_and_line(
    make: Callable[[], Any], node: str, autojump_clock: MockClock
) -> None:
    with logged() as lines:
        async with opened(make()) as session:
            with pytest.raises(RequestFailed) as caught:
                await session.generate([1], sampling=FIVE, request_id="r")
    said = str(caught.value)
    assert said.startswith(f"{node}: the function {__name__}.fails raised JSONDecodeError: ")
    assert "Expecting property name" in said
    assert said.endswith(f"({line_of('raises here')})")
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    assert caught.value.code == "operator_failed"
    (line,) = [line for line in lines if line["event"] == "operator_failed"]
    assert (line["log_level"], line["node"], line["request_id"]) == ("error", node, "r")
    assert line["at"] == line_of("raises here")
    assert "Expecting property name" in line["exception"]
    assert "/operators/" not in line["exception"]  # it begins in the user's file


async def test_an_async_function_that_raises_is_named_too(autojump_clock: MockClock) -> None:
    async with opened(ops.map(fails_later)) as session:
        with pytest.raises(RequestFailed, match="JSONDecodeError") as caught:
            await anext(session.stream([1], sampling=FIVE))
    assert str(caught.value).endswith(f"({line_of('raises later')})")


def leaves(request: Request) -> str:
    if request.prompt == "exit":
        sys.exit(3)  # leaves here
    return "b"


async def is_cancelled(request: Request) -> str:
    if request.prompt == "exit":
        raise asyncio.CancelledError
    return "b"


async def sleeps_in_asyncio(request: Request) -> str:
    await asyncio.sleep(1)
    return "b"


@pytest.mark.parametrize(
    ("function", "says"),
    [(leaves, "raised SystemExit: 3 .*"), (is_cancelled, "raised CancelledError .*")],
)
async def test_a_function_cannot_end_the_graph(
    function: Callable[..., Any], says: str, autojump_clock: MockClock
) -> None:
    async with opened(ops.map(function)) as session:
        with pytest.raises(RequestFailed, match=says):
            await session.generate("exit", sampling=FIVE)
        assert len((await session.generate("a", sampling=FIVE)).token_ids) == 5


async def test_an_empty_prompt_names_the_function(autojump_clock: MockClock) -> None:
    async with opened(ops.map(lambda request: "")) as session:
        with pytest.raises(RequestFailed, match="returned an empty prompt"):
            await session.generate("a", sampling=FIVE)


async def test_an_asyncio_function_is_told_to_use_trio(autojump_clock: MockClock) -> None:
    async with opened(ops.map(sleeps_in_asyncio)) as session:
        with pytest.raises(RequestFailed, match="no running event loop; graphs run on trio"):
            await session.generate("a", sampling=FIVE)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: (ops.map(none),), "returned None; a prompt or a Request was wanted"),
        (lambda: (ops.filter(none),), "returned None; True or False was wanted"),
        (lambda: (ops.flat_map(none),), "returned None; a list was wanted"),
        (lambda: (ops.key_by(none),), "returned None; a key was wanted"),
        (lambda: (ops.policy_sort("own", function=none),), "returned None; a number was wanted"),
    ],
    ids=["map", "filter", "flat_map", "key_by", "policy_sort"],
)
async def test_a_function_that_returns_nothing_is_told_what_was_wanted(
    make: Callable[[], Any], says: str, autojump_clock: MockClock
) -> None:
    async with opened(*make()) as session:
        with pytest.raises(RequestFailed) as caught:
            await session.generate([1], sampling=FIVE)
    assert str(caught.value).endswith(f"none {says} ({line_of('returns none')})")


async def test_a_function_on_tokens_that_returns_nothing(autojump_clock: MockClock) -> None:
    async with opened(after=(ops.map(none),)) as session:
        with pytest.raises(RequestFailed, match="None; a text or a TokenEvent was wanted"):
            await session.generate([1], sampling=FIVE)


@pytest.mark.parametrize("op", [ops.filter, ops.map, ops.key_by])
async def test_a_coroutine_is_no_result(op: Any, autojump_clock: MockClock) -> None:
    async with opened(op(lambda item: pending(item))) as session:
        with pytest.raises(RequestFailed, match="returned a coroutine; make it `async def`"):
            await session.generate([1], sampling=FIVE)


# ---- own operators ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A logic operator whose Step for an arrival is `answer(arrival)`."""

    answer: Callable[[Item], Any]
    initial: None = None

    def on(self, state: None, happened: Any, now: float, draw: Any) -> Any:  # own operator
        if isinstance(happened, Arrival):
            return self.answer(happened.item)
        return Step(state)


class OwnService:
    """A service operator that calls `answer`."""

    concurrency = 1
    holds = False

    def __init__(self, answer: Callable[[Item], Any]) -> None:
        self._answer = answer

    def capacity(self, facts: EngineFacts | None) -> Credit:
        return Credit(requests=4)

    async def on_item(self, ctx: Context, item: Item) -> None:  # own service
        self._answer(item)

    async def on_events(self, ctx: Context, events: Any) -> None: ...
    def on_signal(self, ctx: Context, signal: Any) -> None: ...
    def recall(self, ctx: Context, key: Any) -> None: ...
    def discard(self, ctx: Context, item: Item) -> None: ...


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda item: {}["x"], "the operator raised KeyError: 'x' ("),
        (lambda item: None, "`on` returned None; a Step was wanted ("),
        (lambda item: Step(None, Emit(item)), "a value of type Emit; a tuple was wanted ("),
        (lambda item: Step(None, (item,)), "a value of type Request is no output; known are Emit"),
        (lambda item: Step(None, (Emit("text"),)), "it sent a value of type str; a Request, "),
        (lambda item: Step(None, (Emit(item, "left"),)), "its outlet 'left' leads nowhere; conn"),
        (lambda item: Step(None), "took a Request, kept nothing and sent nothing; its request wo"),
        (
            lambda item: Step(None, (Terminate(TokenEvent(request_id="r")),)),
            "an event without a finish_reason; give one (",
        ),
    ],
)
async def test_an_operator_that_answers_wrongly_fails_the_request_alone(
    answer: Any, says: str, autojump_clock: MockClock
) -> None:
    def once(item: Item) -> Any:
        return answer(item) if item.request_id == "bad" else Step(None, (Emit(item),))

    async with own_graph(Own(once)) as session:
        with pytest.raises(RequestFailed) as caught:
            await session.generate([1], sampling=FIVE, request_id="bad")
        assert str(caught.value).startswith("policy_sort: ")
        assert says in str(caught.value)
        assert f"({HERE}:" in str(caught.value)
        assert (await session.generate([1], sampling=FIVE)).finish_reason == "length"
        await session.idle()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda item: {}["x"], "the operator raised KeyError: 'x' ("),
        (lambda item: None, "`on_item` took a Request and sent nothing; its request would never"),
    ],
)
async def test_a_service_that_raises_or_drops_a_request(
    answer: Any, says: str, autojump_clock: MockClock
) -> None:
    async with own_graph(OwnService(answer)) as session:
        with pytest.raises(RequestFailed) as caught:
            await session.generate([1], sampling=FIVE)
        assert says in str(caught.value)
        assert f"({HERE}:" in str(caught.value)
        await session.idle()


async def test_a_strategy_that_raises_fails_its_requests_and_blocks_no_other(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """A waiting request leaves the queue too."""

    def own(candidates: Candidates, *_: Any) -> int:
        return 0 if candidates.request.user_id else {}["user"]  # own strategy

    monkeypatch.setattr(route, "find_strategy", lambda name: own)
    graph = Graph("g").engine("g", **NULL, replicas=2)
    sort, router = ops.policy_sort(), ops.route("random")
    async with (graph >> sort >> router >> ops.generate(engine="g")).open() as session:
        with pytest.raises(RequestFailed, match="route: the operator raised KeyError") as caught:
            await session.generate([1], sampling=FIVE)
        assert str(caught.value).endswith(f"({line_of('own strategy')})")
        answer = await session.generate([1], sampling=FIVE, user_id="u")
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("chosen", [None, 7, -1, math.nan, True])
async def test_a_strategy_that_chooses_no_replica(
    chosen: Any, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(route, "find_strategy", lambda name: lambda *_: chosen)
    graph = Graph("g").engine("g", **NULL, replicas=2)
    async with (graph >> ops.route("random") >> ops.generate(engine="g")).open() as session:
        with pytest.raises(RequestFailed, match="a replica of g, 0 to 1, was wanted"):
            await session.generate([1], sampling=FIVE)


@pytest.mark.parametrize("how", ["generate", "stream"])
async def test_an_operator_that_refuses_raises_with_its_reason(
    how: str, autojump_clock: MockClock
) -> None:
    def refuse(item: Any) -> Any:
        return Step(None, (Terminate(refusal(item, "refused", now=0.0, error="no tigers")),))

    async with own_graph(Own(refuse)) as session:
        with pytest.raises(RequestRefused, match="no tigers"):
            await (session.generate([1]) if how == "generate" else anext(session.stream([1])))
