"""The graphs that ship with the package: they load, check clean and round-trip."""

from pathlib import Path

import pytest

import sagellm.graphs
from sagellm.graphs.check import Facts, check
from sagellm.graphs.sections import model_tasks
from sagellm.graphs.text.yaml import dump, load, load_file
from sagellm.graphs.vocabulary import Vocabulary

FOLDER = Path(sagellm.graphs.__file__).parent
FILES = sorted(FOLDER.glob("*.yaml"))


def test_five_graphs_ship() -> None:
    assert [path.stem for path in FILES] == ["embed", "joint", "map", "pd", "pd_many"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_graph_is_named_as_its_file_and_right(path: Path, vocabulary: Vocabulary) -> None:
    graph = load_file(path).graph
    assert graph.name == path.stem
    assert check(graph, vocabulary, Facts()) == ()
    assert load(dump(graph), file="again").graph == graph


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_engine_of_a_shipped_graph_is_the_model_that_ships(path: Path) -> None:
    engines = load_file(path).graph.engines
    assert {options["model"] for options in engines.values()} == {"sage-tiny"}


def test_pd_many_has_two_replicas_of_each_engine_and_routes_both_ways() -> None:
    graph = load_file(FOLDER / "pd_many.yaml").graph
    assert [options["replicas"] for options in graph.engines.values()] == [2, 2]
    assert graph.inputs("prefill")[0].source == "route"
    assert graph.inputs("generate")[0].source == "route_aggregated"


def test_embed_sends_texts_and_prompts_to_engines_of_their_own() -> None:
    graph = load_file(FOLDER / "embed.yaml").graph
    assert [model_tasks(graph, key) for key in graph.models] == [("generate",), ("embed",)]


def test_map_runs_a_function_on_each_side_of_the_model() -> None:
    graph = load_file(FOLDER / "map.yaml").graph
    functions = [node.attrs["function"] for node in graph.nodes if node.op == "map"]
    assert functions == ["rewrite_prompt", "read_answer"]
    order = [node.op for node in graph.topological()]
    assert order.index("map") < order.index("generate") < order.index("collect")
