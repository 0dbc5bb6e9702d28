"""A plan: what each operator gets to know of its place in the graph."""

from dataclasses import replace

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node
from sagellm.graphs.text.yaml import load_file
from sagellm.runtime.operator import Target
from sagellm.runtime.plan import Plan, plan, targets_of
from sagellm.runtime.resolver import Resolver


def planned(name: str, replicas: int = 1) -> Plan:
    graph = load_file(f"graphs/{name}.yaml").graph
    return plan(graph, Resolver(), dict.fromkeys(graph.engines, replicas))


def test_logic_and_services_are_told_apart() -> None:
    made = planned("pd")
    assert set(made.services) == {"prefill", "transfer", "decode", "generate"}
    assert set(made.logic) == {"admission", "sort", "split", "route", "metrics"}


def test_an_operator_has_as_many_replicas_as_its_engine() -> None:
    made = planned("pd_many", replicas=2)
    assert made.num_replicas("prefill") == made.num_replicas("generate") == 2
    assert made.num_replicas("transfer") == 1


def test_a_router_sees_the_engines_until_the_next_router() -> None:
    made = planned("pd_many", replicas=2)
    replicas = {node.name: made.num_replicas(node.name) for node in made.graph.nodes}
    targets = targets_of(made.graph, made.graph.node("route"), Resolver().vocabulary, replicas)
    out = frozenset({"out"})
    assert targets == (
        Target("prefill", 2, "p", True, out, True, "prefill"),
        Target("decode", 2, "d", False, out, False, "decode"),
    )


def test_targets_know_which_outlets_lead_to_them() -> None:
    made = planned("pd")
    replicas = {node.name: made.num_replicas(node.name) for node in made.graph.nodes}
    targets = targets_of(made.graph, made.graph.node("split"), Resolver().vocabulary, replicas)
    outlets = {target.node: (set(target.outlets), target.is_next) for target in targets}
    assert outlets == {
        "prefill": ({"disaggregated"}, True),
        "decode": ({"disaggregated"}, False),
        "generate": ({"aggregated"}, True),
    }


def test_an_engine_can_be_avoided_where_a_split_leads_to_others_too() -> None:
    made = planned("pd")
    assert {name: made.can_avoid(name) for name in made.graph.engines} == {"p": True, "d": False}
    assert not planned("joint").can_avoid("g")


def test_ancestors_are_all_that_lies_upstream() -> None:
    made = planned("pd")
    assert set(made.ancestors("generate")) == {"split", "sort", "admission"}
    assert set(made.ancestors("transfer")) == {"prefill", "route", "split", "sort", "admission"}


def test_options_that_contradict_each_other_are_a_graph_error() -> None:
    node = Node("sort", "policy_sort", FrozenMap({"policy": "own"}))
    with pytest.raises(GraphError, match="sort"):
        plan(Graph("g", nodes=(node,)), Resolver(), {})


def test_feedback_reaches_those_upstream_that_subscribe() -> None:
    made = planned("pd")
    assert made.subscribers("prefill", "load") == ("route",)
    assert made.subscribers("generate", "credit") == ("sort",)
    assert made.subscribers("sort", "queue") == ("admission",)


def test_a_feedback_edge_leads_feedback_elsewhere() -> None:
    made = planned("pd")
    edge = Edge("generate", "route", feedback=True)
    graph = replace(made.graph, edges=(*made.graph.edges, edge))
    assert replace(made, graph=graph).subscribers("generate", "credit") == ("sort", "route")
    assert "route" not in replace(made, graph=graph).ancestors("generate")
