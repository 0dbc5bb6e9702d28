"""The place of a refused model in errors: the text that the user wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from logged import logged

from sagellm import Graph, GraphError, ops
from sagellm.backends import interface
from sagellm.backends.cpu.device import CpuDevice
from sagellm.backends.null import NullBackend
from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.graphs.models import family
from sagellm.graphs.text.yaml import Document
from sagellm.opening.checking import check_graph


def refused(graph: Graph, **given: Any) -> Diagnostic:
    with pytest.raises(GraphError) as error:
        check_graph(graph.document, RESOLVER, {}, **given)
    (only,) = error.value.diagnostics
    return only


def test_a_model_of_the_command_line_is_said_once_and_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    found = refused(Graph.load("pd"), model=missing)
    assert (found.path, found.position) == ((f"--model {missing}",), None)
    assert found.message == f"model {missing}: there is no such folder"
    assert found.hint == "check the path"


def test_a_model_that_is_set_for_one_engine() -> None:
    found = refused(Graph.load("pd"), overrides={"p.model": "./missing"})
    assert (found.path, found.position) == (("--set p.model=./missing",), None)


def test_a_model_of_a_file_is_said_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "sagellm: 1\nname: own\nengines:\n  g: {model: ./missing}\n"
        "operators:\n  generate: {op: generate, engine: g}\n"
        "edges: [source -> generate -> sink]\n"
    )
    found = refused(Graph.load(path))
    assert found.position is not None
    assert (found.position.file, found.position.line) == (str(path), 4)


@pytest.mark.parametrize(
    ("graph", "target", "value", "place"),
    [
        ("pd", "split.min_uncached_tokens", "eight", "--set split.min_uncached_tokens=eight"),
        ("pd", "splitt.x", 1, "--set splitt.x=1"),
        ("pd", "executor.kind", "process", "--executor process"),
        ("joint", "g.max_model_len", 999999, "--set g.max_model_len=999999"),
        ("joint", "g.device", "gpu", "--set g.device=gpu"),
    ],
)
def test_a_mistake_in_what_was_set_is_not_one_of_the_file(
    graph: str, target: str, value: object, place: str
) -> None:
    found = refused(Graph.load(graph), overrides={target: value})
    assert (found.path, found.position) == ((place,), None)


async def test_the_size_of_a_pool_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory shrinks while engines open: they keep the sizes of the check."""
    told = iter(2**30 // (1 + count) for count in range(100))
    monkeypatch.setattr(CpuDevice, "memory_bytes", property(lambda _: next(told)))
    async with Graph.load("pd_many").open() as session:
        for replicas in session.executor.engines.values():
            assert len({engine.facts.num_blocks for engine in replicas}) == 1


def renamed(graph: FrozenGraph, old: str, new: str) -> FrozenGraph:
    edges = tuple(replace(edge, outlet=new) if edge.outlet == old else edge for edge in graph.edges)
    return replace(graph, edges=edges)


def test_the_outlet_joint_is_taken_for_aggregated_and_said() -> None:
    graph = Graph.load("pd").document.graph
    former = Document(renamed(graph, "aggregated", "joint"), {})
    with logged() as lines:
        assert check_graph(former, RESOLVER) == check_graph(Document(graph, {}), RESOLVER)
    (line,) = [line for line in lines if line["event"] == "outlet_renamed"]
    assert (line["outlet"], line["fix"]) == ("split.joint", "write split.aggregated")


def test_python_takes_the_outlet_joint_too() -> None:
    split = ops.pd_split()
    graph = Graph("g").engine("g", model="null", device="null") >> split
    split.outlet("joint") >> ops.generate(engine="g").named("short")
    split.outlet("disaggregated") >> ops.generate(engine="g").named("long")
    found = check_graph(graph.document, RESOLVER)
    assert found.outputs("pd_split", "aggregated")


def test_worker_processes_do_not_have_a_backend_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interface, "_registered", {"mine": NullBackend("mine")})
    graph = Graph("g").engine("g", model="null", device="mine:0")
    graph >> ops.generate(engine="g")
    check_graph(graph.document, RESOLVER)
    found = refused(graph, overrides={"executor.kind": "processes"})
    assert "backend `mine:0` is registered in this process" in found.message


def test_the_old_name_of_a_shipped_graph_s_operator_may_be_set() -> None:
    document = Graph.load("pd_many").document
    found = check_graph(document, RESOLVER, {}, {"route_joint.strategy": "round_robin"})
    node = next(node for node in found.nodes if node.name == "route_aggregated")
    assert node.attrs["strategy"] == "round_robin"


def test_a_family_of_this_process_is_refused_for_worker_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(family, "_registered", {"Qwen3ForCausalLM": None})
    document = Graph.load("joint").document
    with pytest.raises(GraphError, match="registered in this process; worker processes"):
        check_graph(document, RESOLVER, {}, {"executor.kind": "processes"})
    check_graph(document, RESOLVER, {})
