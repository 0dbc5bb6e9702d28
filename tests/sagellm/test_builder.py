"""The DSL builds the same graph that YAML does, and refuses what makes no sense."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from models_on_the_fly import make_model

from sagellm import Graph, GraphError, Request, ops
from sagellm.builder import RESOLVER
from sagellm.graphs.ir import SINK, SOURCE
from sagellm.graphs.text import yaml
from sagellm.graphs.text.yaml import Document
from sagellm.opening import checking
from sagellm.opening.sources import override


def pd() -> Graph:
    """pd.yaml, in Python."""
    graph = Graph("pd").engine("p", model="sage-tiny", device="cpu")
    graph.engine("d", model="sage-tiny", device="cpu")
    split = ops.pd_split(min_uncached_tokens=32).named("split")
    metrics = ops.metrics_sink().named("metrics")
    graph >> ops.admission(max_queued=4096) >> ops.policy_sort("slo_aware").named("sort") >> split
    route = split.outlet("disaggregated") >> ops.route(strategy="load_balanced")
    transfer = route >> ops.prefill(engine="p") >> ops.kv_transfer().named("transfer")
    transfer >> ops.decode(engine="d") >> metrics
    split.outlet("aggregated") >> ops.generate(engine="d") >> metrics
    return graph


def test_python_and_yaml_give_the_same_graph() -> None:
    built, loaded = pd().ir, Graph.load("pd").ir
    assert set(built.edges) == set(loaded.edges)
    assert set(built.nodes) == set(loaded.nodes)
    assert built.attrs == loaded.attrs


def test_a_built_graph_can_be_written_and_read() -> None:
    graph = pd().ir
    assert yaml.load(yaml.dump(graph), file="pd.yaml").graph == graph


def test_a_chain_begins_at_source_and_ends_at_sink() -> None:
    graph = Graph("g") >> ops.admission() >> ops.metrics_sink()
    assert [str(edge) for edge in graph.ir.edges] == [
        f"{SOURCE} -> admission",
        "admission -> metrics_sink",
        f"metrics_sink -> {SINK}",
    ]


def test_operators_of_one_op_get_numbers() -> None:
    graph = Graph("g") >> ops.route() >> ops.route()
    assert graph.ir.names == ("route", "route_2")


def test_a_name_of_ones_own_is_taken_once() -> None:
    graph = Graph("g") >> ops.route().named("r")
    with pytest.raises(ValueError, match="two operators are named 'r'"):
        graph >> ops.route().named("r")


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda: ops.admision(), "did you mean 'admission'"),
        (lambda: ops.admission(max_queue=3), "did you mean 'max_queued'"),
        (lambda: ops.pd_split().outlet("agregated"), "did you mean 'aggregated'"),
        (lambda: ops.kv_transfer(1, 2, 3), "takes 2 options"),
        (lambda: ops.admission() >> ops.route(), "begin with Graph"),
    ],
)
def test_mistakes_are_named_where_they_are_made(mistake: object, hint: str) -> None:
    with pytest.raises((AttributeError, TypeError, ValueError), match=hint):
        mistake()  # type: ignore[operator]


def test_an_operator_belongs_to_one_graph() -> None:
    shared = ops.admission()
    Graph("a") >> shared
    with pytest.raises(ValueError, match="belongs to graph 'a'"):
        Graph("b") >> shared


def test_a_function_is_registered_under_its_name() -> None:
    def shout(request: Request) -> str:
        return request.prompt.upper()

    graph = Graph("g") >> ops.map(shout)
    (symbol,) = graph.functions
    assert graph.ir.node("map").attrs["function"] == symbol
    assert graph.functions[symbol] is shout


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Graph.load(tmp_path / "nothing.yaml")


async def test_mistakes_are_found_before_anything_is_loaded() -> None:
    graph = Graph("g").engine("g", model="sage-tiny", block_sise=3)
    graph >> ops.generate(engine="h")
    with pytest.raises(GraphError) as caught:
        await graph.open().__aenter__()
    text = str(caught.value)
    assert "block_size" in text
    assert "engine" in text


async def test_an_override_names_what_is_there() -> None:
    with pytest.raises(GraphError, match="did you mean split"):
        await Graph.load("pd").open(set={"splt.min_uncached_tokens": 1}).__aenter__()


async def test_contradicting_options_are_a_graph_error() -> None:
    with pytest.raises(GraphError, match=r"pd.yaml:\d+:\d+: .*aging_s"):
        checking.check_graph(overridden("sort.aging_s", 5.0), RESOLVER)


def overridden(option: str, value: object) -> Document:
    loaded = Graph.load("pd").document
    return Document(override(loaded.graph, {option: value}), loaded.positions)


async def test_engines_of_one_graph_read_tokens_alike(tmp_path: Path) -> None:
    other = str(make_model("llama", tmp_path))
    with pytest.raises(GraphError, match="different tokenizers"):
        await Graph.load("pd").open(set={"p.model": other}).__aenter__()


def test_two_lambdas_are_two_functions() -> None:
    graph = Graph("g") >> ops.map(lambda item: "one") >> ops.map(lambda item: "two")
    first, second = (graph.ir.node(name).attrs["function"] for name in ("map", "map_2"))
    assert graph.functions[str(first)](None) == "one"
    assert graph.functions[str(second)](None) == "two"


class Greeter:
    def __init__(self, word: str) -> None:
        self.word = word

    def greet(self, item: object) -> str:
        return self.word


def test_methods_of_two_objects_are_two_functions() -> None:
    graph = Graph("g") >> ops.map(Greeter("a").greet) >> ops.map(Greeter("b").greet)
    called = [graph.functions[str(node.attrs["function"])](None) for node in graph.ir.nodes]
    assert called == ["a", "b"]


def test_a_graph_from_a_file_is_not_built_on() -> None:
    with pytest.raises(ValueError, match="read from a file"):
        Graph.load("pd").engine("x", model="sage-tiny")
    with pytest.raises(ValueError, match="read from a file"):
        Graph.load("pd") >> ops.admission()


def test_a_callable_object_has_a_name_too() -> None:
    graph = Graph("g") >> ops.map(functools.partial(str.upper))
    assert len(graph.functions) == 1


async def test_an_unknown_device_is_a_graph_error() -> None:
    with pytest.raises(GraphError, match="did you mean cpu"):
        await Graph.load("joint").open(set={"g.device": "cpuu"}).__aenter__()


def test_graphs_are_checked_without_loading_torch() -> None:
    code = "import sys, sagellm.cli.graph, sagellm.builder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


async def test_no_model_is_fetched_for_a_graph_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(checking, "describe_engine", lambda graph, name: asked.append(name))
    with pytest.raises(GraphError, match="max_queued"):
        await Graph.load("pd").open(set={"admission.max_queue": 1}, model="a/b").__aenter__()
    assert asked == []


@pytest.mark.parametrize(
    ("wrong", "says"), [(len, r"ops\.map\(function\)"), ("map", r"an operator of sagellm\.ops")]
)
def test_what_is_no_operator_is_named(wrong: object, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Graph("g") >> wrong  # type: ignore[operator]
    with pytest.raises(TypeError, match=says):
        Graph("g") >> ops.admission() >> wrong  # type: ignore[operator]
