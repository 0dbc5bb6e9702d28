"""Writing the YAML form, and refusing graphs that it cannot hold."""

from dataclasses import replace

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, freeze
from sagellm.graphs.text.yaml import dump, load, scalar

TEXT = """\
sagellm: 1
name: small
engines:
  g:    {model: sage-tiny}
  long: {model: ./folder, replicas: 2}
operators:
  sort:  {op: policy_sort, window: 4, ratio: 0.5, names: [a, "b c"], more: {on: null}}
  split: {op: pd_split}
edges:
  - source -> sort -> split
  - split.aggregated -> sort.late
  - split ~> sort
  - split -> sink
budgets: {slo_ttft_s: 2, ttft_shares: {sort: 0.5}}
executor: {kind: tasks}
"""
SMALL = Graph("small", nodes=(Node("a", "map"),), edges=(Edge("source", "a"), Edge("a", "sink")))


def test_the_text_is_what_people_write() -> None:
    assert dump(load(TEXT, file="f").graph) == TEXT


def test_an_empty_graph_has_its_sections() -> None:
    text = dump(Graph("nothing"))
    assert text == "sagellm: 1\nname: nothing\noperators: {}\nedges: []\n"
    assert load(text, file="f").graph == Graph("nothing")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("a/b-c.d", "a/b-c.d"),
        ("true", '"true"'),
        ("null", '"null"'),
        ("~", '"~"'),
        ("12", '"12"'),
        ("1e3", '"1e3"'),
        (".inf", '".inf"'),
        ("", '""'),
        ("a: b", '"a: b"'),
        ("<<", '"<<"'),
        ("größe", '"größe"'),
        ("\x85", '"\\u0085"'),
        ("\U000e0001", '"\\U000e0001"'),
        (None, "null"),
        (True, "true"),
        (1.0, "1.0"),
    ],
)
def test_a_text_is_quoted_where_it_could_be_more(value: object, text: str) -> None:
    assert scalar(value) == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("graph", "word"),
    [
        (replace(SMALL, dialect="kernel"), "kernel graph"),
        (replace(SMALL, nodes=(Node("a", "map", body=Graph("b")),)), "body"),
        (replace(SMALL, edges=(Edge("source", "a", type="request"),)), "typed"),
        (replace(SMALL, nodes=(Node("a.b", "map"),)), "no name"),
        (replace(SMALL, nodes=(Node("a", "map"), Node("a", "map"))), "taken"),
        (replace(SMALL, nodes=(Node("sink", "map"),)), "taken"),
        (replace(SMALL, nodes=(Node("a", "map", FrozenMap({"op": 1})),)), "called `op`"),
        (replace(SMALL, attrs=FrozenMap({"owner": "me"})), "no place"),
        (replace(SMALL, attrs=FrozenMap({"engines": 3})), "must be a mapping"),
        (replace(SMALL, attrs=FrozenMap({"engines": FrozenMap({"g": 1})})), "must be a mapping"),
        (replace(SMALL, attrs=FrozenMap({"executor": FrozenMap()})), "no kind"),
        (replace(SMALL, nodes=(Node("a", "map", FrozenMap({"x": float("inf")})),)), "finite"),
        (replace(SMALL, nodes=(Node("a", "map", FrozenMap({"x": 2**63})),)), "64 bits"),
    ],
)
def test_what_yaml_cannot_hold_is_refused(graph: Graph, word: str) -> None:
    with pytest.raises(GraphError, match=word):
        dump(graph)


def test_too_deep_a_value_is_refused() -> None:
    value: object = 1
    for _ in range(30):
        value = [value]
    with pytest.raises(GraphError, match="deeper"):
        dump(replace(SMALL, nodes=(Node("a", "map", FrozenMap({"x": freeze(value)})),)))


@pytest.mark.parametrize("symbol", ["app.<lambda>", "app.main.<locals>.rewrite"])
def test_a_local_function_is_refused(symbol: str) -> None:
    graph = replace(SMALL, nodes=(Node("a", "map", FrozenMap({"function": symbol})),))
    with pytest.raises(GraphError, match="register the function under a name"):
        dump(graph)


def test_all_refusals_come_at_once() -> None:
    nodes = (Node("a.b", "map", FrozenMap({"op": 1}), Graph("b")),)
    with pytest.raises(GraphError) as caught:
        dump(replace(SMALL, nodes=nodes))
    assert len(caught.value.diagnostics) == 3
