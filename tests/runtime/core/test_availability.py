"""Which gates are closed while engines are missing, and how long requests wait for them."""

import math

import pytest

from sagellm import Graph
from sagellm.builder import RESOLVER
from sagellm.runtime.core.availability import Availability
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Credit
from sagellm.runtime.plan import plan

HOLD_S = 30.0


def available(graph: str, max_hold_s: float = HOLD_S, **replicas: int) -> Availability:
    made, gates = plan(Graph.load(graph).ir, RESOLVER, replicas), Gates()
    for node in made.services:
        for number in range(made.num_replicas(node)):
            gates.open(CreditGate(node, number), Credit())
    return Availability(made, gates, max_hold_s)


def closed(missing: Availability) -> set[tuple[str, int]]:
    """The gates of operators with an engine that take no new request."""
    plan, gates = missing.plan, missing.gates
    every = {
        CreditGate(node, number)
        for node in plan.services
        if plan.engine_name(node)
        for number in range(plan.num_replicas(node))
    }
    return {gate for gate in every if gates.take(gate, Request(request_id=str(gate))) is not None}


def lose(missing: Availability, *lost: tuple[str, int], now: float = 0.0) -> None:
    for engine, replica in lost:
        missing.mark(engine, replica, now, is_up=False)


@pytest.mark.parametrize(
    ("lost", "closed_gates"),
    [
        ([], set()),
        ([("p", 1)], {("prefill", 1)}),
        ([("d", 0)], {("decode", 0), ("generate", 0)}),
        ([("p", 0), ("p", 1)], {("prefill", 0), ("prefill", 1)}),
        (
            [("d", 0), ("d", 1)],  # the results of prefill would have nowhere to go
            {(node, n) for node in ("prefill", "decode", "generate") for n in (0, 1)},
        ),
    ],
)
def test_which_gates_are_closed(
    lost: list[tuple[str, int]], closed_gates: set[tuple[str, int]]
) -> None:
    missing = available("pd_many", p=2, d=2)
    lose(missing, *lost)
    assert closed(missing) == closed_gates
    for engine, replica in lost:
        missing.mark(engine, replica, 1.0, is_up=True)
    assert closed(missing) == set()


@pytest.mark.parametrize(
    ("graph", "lost", "is_cut"),
    [
        ("joint", [], False),
        ("joint", [("g", 0)], True),
        ("pd", [("p", 0)], False),  # short prompts need no prefill engine
        ("pd", [("d", 0)], True),
    ],
)
def test_a_graph_is_cut_where_no_way_is_left(
    graph: str, lost: list[tuple[str, int]], is_cut: bool
) -> None:
    missing = available(graph, **({"g": 1} if graph == "joint" else {"p": 1, "d": 1}))
    lose(missing, *lost)
    assert missing.is_cut == is_cut


def test_a_sibling_keeps_a_graph_from_being_cut() -> None:
    missing = available("joint", g=2)
    lose(missing, ("g", 0))
    assert not missing.is_cut
    assert missing.next_end_s == math.inf


def test_the_wait_begins_with_the_last_replica_and_begins_anew_once_it_is_over() -> None:
    missing = available("joint", g=2)
    lose(missing, ("g", 0), now=1.0)
    lose(missing, ("g", 1), now=5.0)
    lose(missing, ("g", 1), now=6.0)
    assert missing.next_end_s == 35.0
    assert not missing.take_due(34.9)
    assert missing.take_due(35.0)
    assert missing.next_end_s == 35.0 + HOLD_S / 8
    missing.mark("g", 0, 40.0, is_up=True)
    assert missing.next_end_s == math.inf
