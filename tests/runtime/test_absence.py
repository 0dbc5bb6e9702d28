"""Which ways through a graph are shut while engines are missing, and for how long that is borne."""

import math
from typing import Any

import pytest

from sagellm import Graph
from sagellm.builder import RESOLVER
from sagellm.runtime.executors.absence import Absence
from sagellm.runtime.plan import plan

HOLD_S = 30.0


def absence(graph: str, max_hold_s: float = HOLD_S, **replicas: int) -> Absence:
    engines: dict[str, Any] = {name: (object(),) * count for name, count in replicas.items()}
    return Absence(plan(Graph.load(graph).ir, RESOLVER, engines), max_hold_s)


def lose(missing: Absence, *lost: tuple[str, int], now: float = 0.0) -> None:
    for engine, replica in lost:
        missing.mark(engine, replica, now, is_up=False)


@pytest.mark.parametrize(
    ("lost", "shut"),
    [
        ([], set()),
        ([("p", 1)], {("prefill", 1)}),
        ([("d", 0)], {("decode", 0), ("generate", 0)}),
        ([("p", 0), ("p", 1)], {("prefill", 0), ("prefill", 1)}),
        (
            [("d", 0), ("d", 1)],  # what prefill computes would find nowhere to go
            {(node, n) for node in ("prefill", "decode", "generate") for n in (0, 1)},
        ),
    ],
)
def test_what_is_shut(lost: list[tuple[str, int]], shut: set[tuple[str, int]]) -> None:
    missing = absence("pd_many", p=2, d=2)
    lose(missing, *lost)
    assert missing.shut == shut
    for engine, replica in lost:
        missing.mark(engine, replica, 1.0, is_up=True)
    assert missing.shut == set()


@pytest.mark.parametrize(
    ("graph", "lost", "is_cut"),
    [
        ("joint", [], False),
        ("joint", [("g", 0)], True),
        ("pd", [("p", 0)], False),  # short prompts do without
        ("pd", [("d", 0)], True),
    ],
)
def test_a_graph_is_cut_where_no_way_is_left(
    graph: str, lost: list[tuple[str, int]], is_cut: bool
) -> None:
    missing = absence(graph, **({"g": 1} if graph == "joint" else {"p": 1, "d": 1}))
    lose(missing, *lost)
    assert missing.is_cut == is_cut


def test_a_sibling_keeps_a_graph_from_being_cut() -> None:
    missing = absence("joint", g=2)
    lose(missing, ("g", 0))
    assert not missing.is_cut
    assert missing.next_end_s == math.inf


def test_the_wait_begins_with_the_last_replica_and_begins_anew_once_it_is_over() -> None:
    missing = absence("joint", g=2)
    lose(missing, ("g", 0), now=1.0)
    lose(missing, ("g", 1), now=5.0)
    lose(missing, ("g", 1), now=6.0)
    assert missing.next_end_s == 35.0
    assert not missing.take_due(34.9)
    assert missing.take_due(35.0)
    assert missing.next_end_s == 35.0 + HOLD_S / 8
    missing.mark("g", 0, 40.0, is_up=True)
    assert missing.next_end_s == math.inf
