"""Placement: all operators share one process, each replica of an engine has its own."""

from dataclasses import replace

from sagellm import Graph
from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.graphs.passes.placement import Place, ShareCores, replicas_of


def under(kind: str, graph: FrozenGraph) -> FrozenGraph:
    executor = FrozenMap({"kind": kind})
    return replace(graph, attrs=FrozenMap({**graph.attrs, "executor": executor}))


def test_under_tasks_all_is_in_one_process() -> None:
    placed = Place().apply(under("tasks", Graph.load("pd_many").ir))
    assert placed.attrs["processes"] == FrozenMap({"graph": placed.names})
    assert replicas_of(placed) == {"p": 0, "d": 0}


def test_each_replica_of_an_engine_is_a_process_that_its_operators_share() -> None:
    graph = under("processes", Graph.load("pd_many").ir)
    placed = Place().apply(graph)
    assert placed.attrs["processes"] == FrozenMap(
        {
            "graph": graph.names,
            "p[0]": ("prefill",),
            "p[1]": ("prefill",),
            "d[0]": ("decode", "generate"),
            "d[1]": ("decode", "generate"),
        }
    )
    assert replicas_of(placed) == {"p": 2, "d": 2}
    assert placed.nodes == graph.nodes


def test_cores_are_shared_by_all_workers() -> None:
    graph = Graph.load("pd_many").ir

    def threads(num_cores: int) -> list[object]:
        engines = ShareCores(num_cores, tuple(graph.engines)).apply(graph).engines.values()
        return [values["threads"] for values in engines if isinstance(values, FrozenMap)]

    assert threads(2) == [1, 1]
    assert threads(8) == [2, 2]


def test_replicas_are_those_of_the_engine_and_of_none_whose_name_begins_alike() -> None:
    engines = {"d": {"replicas": 2}, "d[0]": {"replicas": 3}, "d2": {}}
    graph = under("processes", Graph.load("joint").ir)
    entries = FrozenMap((name, FrozenMap(options)) for name, options in engines.items())
    named = replace(graph, attrs=FrozenMap({**graph.attrs, "engines": entries}))
    assert replicas_of(Place().apply(named)) == {"d": 2, "d[0]": 3, "d2": 1}
