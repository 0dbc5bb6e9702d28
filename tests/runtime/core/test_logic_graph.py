"""Transactions over the states of logic operators."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.runtime.core.credit import CreditGate, Gates, NoCredit
from sagellm.runtime.core.effects import Send
from sagellm.runtime.core.journal import ReachedSink, UpstreamFeedback
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.feedback import Backlog, CreditChanged, QueueChanged
from sagellm.runtime.messages import Request, Stamps, TokenEvent
from sagellm.runtime.operator import (
    Arrival,
    Credit,
    Draw,
    Emit,
    Input,
    Offer,
    OfferTaken,
    Report,
    Signal,
    Step,
    Terminate,
    Wake,
)


def waiting(number: int) -> QueueChanged:
    return QueueChanged(backlog=Backlog(num_requests=number))


@dataclass(frozen=True)
class Counting:
    """Passes items on and counts them."""

    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        if isinstance(happened, Arrival):
            return Step(state + 1, (Emit(happened.item),))
        return Step(state)


@dataclass(frozen=True)
class Keeping:
    """Keeps items, offers them in order, and drops those whose request is cancelled."""

    initial: tuple[Request, ...] = ()

    def on(self, state: Any, happened: Input, now: float, draw: Draw) -> Step[Any]:
        match happened:
            case Arrival(item):
                return self._offer((*state, item))
            case OfferTaken(item):
                return self._offer(tuple(kept for kept in state if kept.key != item.key))
            case CreditChanged():
                return self._offer(state)
            case Signal():
                last = TokenEvent(request_id=happened.request_id, finish_reason="cancelled")
                kept = tuple(item for item in state if not happened.concerns(item.key))
                return Step(kept, (Terminate(last), Report(waiting(len(kept)))))
            case Wake():
                return Step(state, (), now + 1)

    def _offer(self, state: Any) -> Step[Any]:
        return Step(state, (Offer(state),) if state else ())


@dataclass(frozen=True)
class Doubling:
    """Reports feedback, then sends each item twice."""

    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        if isinstance(happened, Arrival):
            return Step(state + 1, (Report(waiting(1)), Emit(happened.item), Emit(happened.item)))
        return Step(state, (Report(waiting(0)),))


def request(name: str, num_tokens: int = 1) -> Request:
    return Request(request_id=name, prompt_token_ids=(1,) * num_tokens)


def chain(*names: str) -> tuple[Edge, ...]:
    return tuple(Edge(a, b) for a, b in pairwise(names))


def make(
    logic: dict[str, Any], *names: str, capacity: Credit, replicas: int = 1
) -> tuple[LogicGraph, Gates]:
    """source -> names... -> engine, whose replicas take `capacity` each."""
    nodes = tuple(Node(name, name) for name in (*names, "engine"))
    graph = Graph("g", nodes=nodes, edges=chain(SOURCE, *names, "engine"))
    gates = Gates()
    for replica in range(replicas):
        gates.open(CreditGate("engine", replica), capacity)
    return LogicGraph(graph, logic, gates, {"engine": replicas}), gates


def sent(effects: Any) -> list[str]:
    return [effect.item.request_id for effect in effects if isinstance(effect, Send)]


def test_an_item_passes_through_every_operator() -> None:
    logic_graph, _ = make({"a": Counting(), "b": Counting()}, "a", "b", capacity=Credit(1))
    assert sent(logic_graph.send(SOURCE, request("r"), "out", 0.0)) == ["r"]
    assert (logic_graph.cells["a"].state, logic_graph.cells["b"].state) == (1, 1)


def test_without_credit_nothing_has_happened() -> None:
    logic_graph, gates = make({"a": Counting()}, "a", capacity=Credit(1))
    logic_graph.send(SOURCE, request("first"), "out", 0.0)
    with pytest.raises(NoCredit, match="engine"):
        logic_graph.send(SOURCE, request("second"), "out", 0.0)
    assert logic_graph.cells["a"].state == 1
    gates.give(CreditGate("engine", 0), ("first", 0))
    assert sent(logic_graph.send(SOURCE, request("second"), "out", 0.0)) == ["second"]


def test_what_an_undone_input_sent_is_taken_back() -> None:
    logic_graph, gates = make({"a": Doubling()}, "a", capacity=Credit(1))
    with pytest.raises(NoCredit):  # the second item finds no credit
        logic_graph.send(SOURCE, request("r"), "out", 0.0)
    assert gates.accounts["engine", 0].num_items == 0
    assert logic_graph.feed("a", Wake(), 0.0) == [UpstreamFeedback("a", waiting(0))]


def test_an_offer_without_credit_keeps_the_item() -> None:
    logic_graph, gates = make({"q": Keeping()}, "q", capacity=Credit(1))
    logic_graph.send(SOURCE, request("first"), "out", 0.0)
    assert sent(logic_graph.send(SOURCE, request("second"), "out", 0.0)) == []
    assert [item.request_id for item in logic_graph.cells["q"].state] == ["second"]
    gates.give(CreditGate("engine", 0), ("first", 0))
    assert sent(logic_graph.feed("q", CreditChanged(node="engine"), 0.0)) == ["second"]
    assert logic_graph.cells["q"].state == ()


def test_what_is_taken_of_an_offer_is_stamped_with_the_time() -> None:
    logic_graph, _ = make({"q": Keeping()}, "q", capacity=Credit(1))
    (send,) = logic_graph.send(SOURCE, request("a"), "out", 3.0)
    assert send.item.stamps == Stamps(dispatched_s=3.0)
    logic_graph.send(SOURCE, request("b"), "out", 4.0)
    assert [item.stamps.dispatched_s for item in logic_graph.cells["q"].state] == [None]


def test_the_next_candidate_is_taken_where_the_head_does_not_fit() -> None:
    logic_graph, _ = make({"q": Keeping()}, "q", capacity=Credit(9, tokens=10))
    logic_graph.send(SOURCE, request("a", 6), "out", 0.0)
    logic_graph.send(SOURCE, request("large", 8), "out", 0.0)
    assert sent(logic_graph.send(SOURCE, request("small", 2), "out", 0.0)) == ["small"]


def test_one_credit_message_sends_all_that_fit() -> None:
    logic_graph, gates = make({"q": Keeping()}, "q", capacity=Credit(2))
    for name in "abcd":
        logic_graph.send(SOURCE, request(name), "out", 0.0)
    gates.give(CreditGate("engine", 0), ("a", 0))
    gates.give(CreditGate("engine", 0), ("b", 0))
    assert sent(logic_graph.feed("q", CreditChanged(node="engine"), 0.0)) == ["c", "d"]


def test_a_replicated_operator_gets_what_was_placed_on_it() -> None:
    logic_graph, _ = make({"a": Counting()}, "a", capacity=Credit(1), replicas=2)
    placed = Request(request_id="r", placement={"engine": 1})
    (effect,) = logic_graph.send(SOURCE, placed, "out", 0.0)
    assert isinstance(effect, Send)
    assert (effect.node, effect.replica) == ("engine", 1)


def test_a_replica_that_nobody_chose_is_an_error_and_changes_nothing() -> None:
    logic_graph, _ = make({"a": Counting()}, "a", capacity=Credit(1), replicas=2)
    with pytest.raises(LookupError, match="no route chose"):
        logic_graph.send(SOURCE, request("r"), "out", 0.0)
    assert logic_graph.cells["a"].state == 0


def test_signals_end_what_is_held_and_tell_upstream() -> None:
    logic_graph, _ = make({"q": Keeping()}, "q", capacity=Credit(1))
    for name in "ab":
        logic_graph.send(SOURCE, request(name), "out", 0.0)
    ended, report = logic_graph.feed("q", Signal("cancel", "b"), 0.0)
    assert isinstance(ended, ReachedSink)
    assert ended.terminal
    assert report == UpstreamFeedback("q", waiting(0))


def test_wake_times_are_kept_until_the_next_answer() -> None:
    logic_graph, _ = make({"q": Keeping()}, "q", capacity=Credit(1))
    logic_graph.feed("q", Wake(), 4.0)
    assert logic_graph.next_wake_s == 5.0
    logic_graph.send(SOURCE, request("a"), "out", 4.5)
    assert logic_graph.next_wake_s == math.inf


def test_an_outlet_into_the_sink_delivers() -> None:
    graph = Graph("g", nodes=(Node("a", "a"),), edges=chain(SOURCE, "a", SINK))
    logic_graph = LogicGraph(graph, {"a": Counting()}, Gates(), {})
    event = TokenEvent(request_id="r", token_ids=(1,))
    assert logic_graph.send(SOURCE, event, "out", 0.0) == [ReachedSink(event)]


def test_equal_inputs_draw_equal_numbers() -> None:
    draws = [Draw(1, "a", 7).random() for _ in range(2)]
    assert draws[0] == draws[1] != Draw(1, "a", 8).random()
    assert all(0 <= Draw(0, "a", number).below(3) < 3 for number in range(50))
