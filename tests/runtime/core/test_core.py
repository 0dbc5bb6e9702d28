"""The core: events in, effects out, without trio, a clock or a device."""

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.graphs.ir import SINK, SOURCE, Edge, Node
from sagellm.graphs.ir import Graph as IR
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import (
    Deliver,
    Discard,
    Effect,
    Interrupt,
    Parked,
    Resumed,
    Send,
    WakeAt,
)
from sagellm.runtime.core.events import (
    Arrived,
    Emitted,
    Opened,
    Released,
    ReplicaAdded,
    ReplicaMarked,
    ReplicaRemoved,
    Signalled,
    TimeCame,
    Withdrawn,
)
from sagellm.runtime.feedback import RoomChanged, Topology
from sagellm.runtime.messages import Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Arrival, Credit, Draw, Emit, Input, Signal, Step
from sagellm.runtime.plan import Plan, plan


def request(name: str, **fields: Any) -> Request:
    return Request(request_id=name, prompt_token_ids=(1,) * 40, **fields)


def last(name: str) -> TokenEvent:
    return TokenEvent(request_id=name, token_ids=(1,), finish_reason="stop")


def routed(num_replicas: int = 2, *, capacity: float = 1) -> Core:
    """policy_sort -> route -> generate, whose replicas take `capacity` requests each."""
    graph = Graph("g").engine("g", replicas=num_replicas)

    shaped = (graph >> ops.policy_sort() >> ops.route() >> ops.generate(engine="g")).ir
    core = Core(plan(shaped, RESOLVER, {"g": num_replicas}))
    for number in range(num_replicas):
        core.on(Opened("generate", number, Credit(capacity), 16), 0.0)
    return core


def plain(*names: str, capacity: float = 1) -> Core:
    """source -> services of these names -> sink; the test stands for their tasks."""
    edges = tuple(Edge(a, b) for a, b in pairwise((SOURCE, *names, SINK)))
    graph = IR("g", nodes=tuple(Node(name, name) for name in names), edges=edges)
    core = Core(Plan(graph, {}, dict.fromkeys(names)))  # type: ignore[arg-type]
    for name in names:
        core.on(Opened(name, 0, Credit(capacity)), 0.0)
    return core


def sent(effects: list[Effect]) -> list[tuple[str, int]]:
    return [(one.item.request_id, one.replica) for one in effects if isinstance(one, Send)]


def reasons(effects: list[Effect]) -> list[Any]:
    return [one.item.finish_reason for one in effects if isinstance(one, Deliver)]  # type: ignore[union-attr]


def test_importing_it_imports_neither_trio_nor_torch() -> None:
    code = "import sys, sagellm.runtime.core.core; print({'trio', 'torch'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_while_a_replica_has_room_nothing_waits() -> None:
    """Replica 1 holds three long requests, replica 0 one heavy request. Each has three places."""
    core = routed(2, capacity=3)
    heavy = Request(request_id="heavy", prompt_token_ids=(1,) * 5000)
    assert sent(core.on(Arrived(1, (heavy,)), 0.0)) == [("heavy", 0)]
    placed = [sent(core.on(Arrived(1, (request(str(n)),)), 0.0)) for n in range(6)]
    assert placed == [[("0", 1)], [("1", 1)], [("2", 1)], [("3", 0)], [("4", 0)], []]


def test_what_finds_no_block_at_the_best_replica_goes_to_another() -> None:
    core = routed(2, capacity=9)
    core.on(Opened("generate", 0, Credit(9, blocks=4), 16), 0.0)
    core.on(Opened("generate", 1, Credit(9, blocks=40), 16), 0.0)
    big = Request(request_id="big", prompt_token_ids=(1,) * 160)
    assert sent(core.on(Arrived(1, (request("a"),)), 0.0)) == [("a", 0)]
    assert sent(core.on(Arrived(1, (request("b"),)), 0.0)) == [("b", 1)]
    assert sent(core.on(Arrived(1, (big,)), 0.0)) == [("big", 1)]


def test_returned_credit_sends_what_waits() -> None:
    core = routed(2)
    for name in "abc":
        core.on(Arrived(1, (request(name),)), 0.0)
    assert sent(core.on(Released("generate", 1, "b", 0), 1.0)) == [("c", 1)]


def test_operators_are_told_whether_engines_are_full() -> None:
    """Room is reported at the end of an event: credit that comes and goes within it changes
    nothing.
    """
    core = routed(1)
    cell, reports = core.logic_graph.cells["policy_sort"], []
    answer = cell.on

    def noting(state: Any, happened: Input, now: float, draw: Draw) -> Step[Any]:
        if isinstance(happened, RoomChanged):
            reports.append((now, happened.has_room))
        return answer(state, happened, now, draw)

    cell.on = noting
    for name in "abc":
        core.on(Arrived(1, (request(name),)), 0.0)
    for second, name in enumerate("abc"):
        core.on(Released("generate", 0, name, 0), second + 1.0)
    assert reports == [(0.0, False), (3.0, True)]


def test_items_without_credit_are_parked_and_go_on_in_order() -> None:
    core = plain("a", "b")
    core.on(Arrived(1, (request("r"),)), 0.0)
    items = (request("r"), request("s"))
    core.on(Arrived(2, (request("s"),)), 0.0)
    assert core.on(Emitted(7, "a", 0, items[:1]), 0.0) == [Send("b", 0, items[0])]
    assert core.on(Emitted(8, "a", 0, items[1:]), 0.0) == [Parked(8, 0)]
    assert core.on(Released("b", 0, "r", 0), 0.0) == [Send("b", 0, items[1]), Resumed(8, 1)]


def test_a_task_that_is_gone_sends_nothing_more() -> None:
    core = plain("a", "b")
    for name in "rs":
        core.on(Arrived(1, (request(name),)), 0.0)
        core.on(Emitted(ord(name), "a", 0, (request(name),)), 0.0)
    core.on(Withdrawn(ord("s")), 0.0)
    assert core.on(Released("b", 0, "r", 0), 0.0) == []


def test_a_signal_interrupts_those_that_hold_its_request_and_no_other() -> None:
    core = routed(2)
    for name in "abc":
        core.on(Arrived(1, (request(name),)), 0.0)
    assert core.on(Signalled(Signal("cancel", "b")), 1.0) == [
        Interrupt("generate", 1, Signal("cancel", "b"))
    ]
    assert reasons(core.on(Signalled(Signal("cancel", "c")), 1.0)) == ["cancelled"]  # it was queued


def test_a_request_expires_at_its_time() -> None:
    core = routed(1)
    core.on(Arrived(1, (request("a"),)), 0.0)
    effects = core.on(Arrived(1, (request("b", expires_s=5.0),)), 0.0)
    assert effects[-1] == WakeAt(5.0)
    assert reasons(core.on(TimeCame(), 5.0)) == ["expired"]


def test_a_replica_that_is_added_gets_requests_once_it_is_up() -> None:
    core = routed(1)
    for name in "abc":
        core.on(Arrived(1, (request(name),)), 0.0)
    assert core.plan.epoch == 0
    core.on(ReplicaAdded("g"), 0.0)
    assert (core.plan.epoch, core.plan.num_replicas("generate")) == (1, 2)
    assert sent(core.on(Opened("generate", 1, Credit(1), 16), 0.0)) == []
    assert sent(core.on(ReplicaMarked("g", 1, is_up=True), 0.0)) == [("b", 1)]


def test_a_replica_that_is_lost_gets_none_until_it_is_back() -> None:
    core = routed(2)
    core.on(ReplicaMarked("g", 0, is_up=False), 0.0)
    assert [sent(core.on(Arrived(1, (request(n),)), 0.0)) for n in "ab"] == [[("a", 1)], []]
    assert sent(core.on(ReplicaMarked("g", 0, is_up=True), 0.0)) == [("b", 0)]


class Noting:
    """Notes topologies and passes items on."""

    initial: tuple[Topology, ...] = ()

    def on(self, state: Any, happened: Input, now: float, draw: Draw) -> Step[Any]:
        match happened:
            case Topology():
                return Step((*state, happened))
            case Arrival(item):
                return Step(state, (Emit(item),))
        return Step(state)


def disaggregated(num_places: int) -> Core:
    """The graph `pd` with limited credit at decode and room at all other operators."""
    core = Core(plan(Graph.load("pd").ir, RESOLVER, {"p": 1, "d": 1}))
    for node in core.plan.services:
        core.on(Opened(node, 0, Credit(num_places if node == "decode" else 8), 16), 0.0)
    return core


def entered(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(one.node, one.item.request_id) for one in effects if isinstance(one, Send)]


def test_a_request_enters_prefill_only_with_a_place_in_decode() -> None:
    core = disaggregated(1)
    assert entered(core.on(Arrived(1, (request("a"),)), 0.0)) == [("prefill", "a")]
    assert entered(core.on(Arrived(2, (request("b"),)), 0.0)) == []
    first = TokenEvent(request_id="a", token_ids=(1,))
    done = Prefilled(request=request("a"), first=first, lease=None)
    core.on(Emitted(0, "prefill", 0, (done,)), 1.0)
    core.on(Released("prefill", 0, "a", 0), 1.0)
    assert entered(core.on(Emitted(0, "transfer", 0, (done,)), 1.0)) == [("decode", "a")]
    assert entered(core.on(Released("transfer", 0, "a", 0), 1.0)) == []
    assert entered(core.on(Released("decode", 0, "a", 0), 2.0)) == [("prefill", "b")]


def test_a_request_that_ends_in_prefill_gives_its_place_in_decode_back() -> None:
    core = disaggregated(1)
    for name in "ab":
        core.on(Arrived(1, (request(name),)), 0.0)
    assert entered(core.on(Released("prefill", 0, "a", 0), 1.0)) == [("prefill", "b")]
    core.on(Released("prefill", 0, "b", 0), 1.0)
    assert core.gates.accounts["decode", 0].requests == 1


def test_what_one_engine_decodes_is_counted_once() -> None:
    """Short prompts take credit of the same engine."""
    core = disaggregated(1)
    short = Request(request_id="short", prompt_token_ids=(1,) * 8)
    assert entered(core.on(Arrived(1, (short,)), 0.0)) == [("generate", "short")]
    assert entered(core.on(Arrived(2, (request("long"),)), 0.0)) == []
    assert entered(core.on(Released("generate", 0, "short", 0), 1.0)) == [("prefill", "long")]


def test_what_waits_for_prefill_goes_on_without_it() -> None:
    graph = Graph.load("pd").ir
    core = Core(plan(graph, RESOLVER, {"p": 1, "d": 1}))
    for node in core.plan.services:
        core.on(Opened(node, 0, Credit(2 if node == "decode" else 1), 16), 0.0)
    sends = [core.on(Arrived(1, (request(name),)), 0.0) for name in "ab"]
    assert [[one.node for one in made if isinstance(one, Send)] for made in sends] == [
        ["prefill"], []
    ]  # fmt: skip
    effects = core.on(ReplicaMarked("p", 0, is_up=False), 1.0)
    assert [(one.node, one.item.request_id) for one in effects if isinstance(one, Send)] == [
        ("generate", "b")
    ]


def test_a_topology_reaches_the_operators_that_subscribe_to_it() -> None:
    core = routed(2)
    core.on(ReplicaMarked("g", 1, is_up=False), 0.0)
    core.on(ReplicaRemoved("g", 1), 0.0)
    assert core.plan.removed == {("g", 1)}
    pool = core.logic_graph.cells["route"].state.pools["g"]
    assert [pool.replicas[number].is_removed for number in range(2)] == [False, True]
    core.on(ReplicaAdded("g"), 0.0)
    assert core.logic_graph.cells["route"].state.pools["g"].size == 3


def test_what_an_operator_downstream_fails_on_is_discarded_by_its_sender() -> None:
    names = ("a", "bad")
    edges = tuple(Edge(a, b) for a, b in pairwise((SOURCE, *names, SINK)))
    graph = IR("g", nodes=tuple(Node(name, name) for name in names), edges=edges)

    class Bad:
        initial = None

        def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
            raise KeyError("secret")

    core = Core(Plan(graph, {"bad": Bad()}, {"a": None}))  # type: ignore[dict-item]
    core.on(Opened("a", 0, Credit()), 0.0)
    core.on(Arrived(1, (request("r"),)), 0.0)
    item = Prefilled(request=request("r"), first=TokenEvent(request_id="r"))
    effects = core.on(Emitted(2, "a", 0, (item,)), 0.0)
    assert Discard("a", 0, item) in effects
    assert reasons(effects) == ["failed"]


@pytest.mark.parametrize("num_replicas", [1, 40])
def test_equal_events_have_equal_effects(num_replicas: int) -> None:
    def effects() -> list[list[Effect]]:
        core = routed(num_replicas)
        every = [core.on(Arrived(n, (request(str(n)),)), n / 7) for n in range(60)]
        gates = [(one.replica, one.item) for made in every for one in made if isinstance(one, Send)]
        for replica, item in gates:
            every.append(core.on(Emitted(0, "generate", replica, (last(item.request_id),)), 9.0))
            every.append(core.on(Released("generate", replica, *item.key), 9.0))
        return every

    assert effects() == effects()


def test_nothing_is_kept_of_what_is_over() -> None:
    core = routed(2)
    for name in "ab":
        core.on(Arrived(1, (request(name),)), 0.0)
    for replica, name in enumerate("ab"):
        core.on(Emitted(0, "generate", replica, (last(name),)), 1.0)
        core.on(Released("generate", replica, name, 0), 1.0)
    assert core.is_at_rest
    core.ledger.check()
    assert len(core.logic_graph.cells["route"].state.placed) == 0
    assert core.gates.holders("a") == ()
    assert core.gates.accounts[("generate", 0)].requests == 1
    assert math.isinf(core.register.next_expiry_s)


def placed(core: Core, name: str) -> int:
    """How many choices of a request the router counts as placed."""
    return len(core.logic_graph.cells["route"].state.placed.get(name, ()))


def test_operators_forget_a_request_once_no_replica_holds_any_of_it() -> None:
    core = routed(1)
    core.on(Arrived(1, (request("a"),)), 0.0)
    core.on(Emitted(2, "generate", 0, (last("a"),)), 1.0)
    assert (placed(core, "a"), core.is_at_rest) == (1, True)
    core.on(Released("generate", 0, "a", 0), 1.0)
    assert placed(core, "a") == 0
    assert core.logic_graph.cells["route"].state.pools["g"].replicas[0].num_held == 0


def test_an_id_that_is_used_again_is_forgotten_before_it_enters() -> None:
    core = routed(1, capacity=2)
    for at_s in (0.0, 1.0):
        assert sent(core.on(Arrived(1, (request("a"),)), at_s)) == [("a", 0)]
        assert placed(core, "a") == 1
        core.on(Emitted(2, "generate", 0, (last("a"),)), at_s)
    for _ in range(2):
        core.on(Released("generate", 0, "a", 0), 2.0)
    assert placed(core, "a") == 0
    assert core.logic_graph.cells["route"].state.pools["g"].replicas[0].num_held == 0
