"""Chains of arrows: parsed, written, and refused where they are ambiguous."""

import pytest

from sagellm.graphs.ir import Edge
from sagellm.graphs.text.surface import ChainError, chains, parse_chain


@pytest.mark.parametrize(
    ("chain", "edges"),
    [
        ("a -> b", [Edge("a", "b")]),
        ("a->b", [Edge("a", "b")]),
        ("  a  ->  b  ", [Edge("a", "b")]),
        ("a -> b -> c", [Edge("a", "b"), Edge("b", "c")]),
        ("a.x -> b.y", [Edge("a", "b", "x", "y")]),
        ("a.x -> b -> c.y", [Edge("a", "b", "x"), Edge("b", "c", inlet="y")]),
        ("a ~> b", [Edge("a", "b", feedback=True)]),
        ("a -> b ~> a", [Edge("a", "b"), Edge("b", "a", feedback=True)]),
        ("my-op -> _x2", [Edge("my-op", "_x2")]),
    ],
)
def test_a_chain_is_its_edges(chain: str, edges: list[Edge]) -> None:
    assert [link.edge for link in parse_chain(chain)] == edges


@pytest.mark.parametrize(
    ("chain", "at", "word"),
    [
        ("a", 0, "no arrow"),
        ("a > b", 0, "no arrow"),
        ("a -> ", 4, "nothing beside"),
        ("-> b", 0, "nothing beside"),
        ("a --> b", 0, "`a -`"),
        ("a -> b.c.d", 5, "`b.c.d`"),
        ("a -> b c", 5, "`b c`"),
        ("a -> b.x -> c", 7, "inlet or an outlet"),
    ],
)
def test_a_broken_chain_says_where(chain: str, at: int, word: str) -> None:
    with pytest.raises(ChainError) as caught:
        parse_chain(chain)
    assert caught.value.at == at
    assert word in caught.value.message
    assert caught.value.hint


def test_ends_have_offsets() -> None:
    (link,) = parse_chain("split.aggregated -> sort.late")
    assert (link.left.at, link.left.port_at) == (0, 6)
    assert (link.right.at, link.right.port_at) == (20, 25)


def test_edges_are_written_as_the_fewest_chains() -> None:
    edges = [
        Edge("a", "b"),
        Edge("b", "c", inlet="x"),
        Edge("c", "d"),
        Edge("d", "a", feedback=True),
    ]
    assert list(chains(edges)) == ["a -> b -> c.x", "c -> d", "d ~> a"]
    assert list(chains([])) == []
