"""Several models in a graph: their table, their outlets and their engines."""

from dataclasses import dataclass, field

import pytest

from sagellm.graphs.check import Facts, check
from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, freeze
from sagellm.graphs.sections import ServedModel, served_models
from sagellm.graphs.text import yaml
from sagellm.graphs.vocabulary import EVENT, REQUEST, ListedPorts, OpSpec, Port, Vocabulary


@dataclass(frozen=True, slots=True)
class Models:
    models: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class OnEngine:
    engine: str


VOCABULARY = Vocabulary(
    {
        "route_model": OpSpec(
            "route_model",
            (Port("in", REQUEST),),
            (),
            Models,
            listed_outlets=ListedPorts("models", REQUEST),
        ),
        "generate": OpSpec(
            "generate",
            (Port("in", REQUEST),),
            (Port("out", EVENT),),
            OnEngine,
            "service",
            engine=True,
        ),
    }
)
TWO = """\
sagellm: 1
name: two
engines:
  x: {}
  y: {}
models:
  a: {aliases: [small]}
  b: {max_model_len: 64}
operators:
  choose: {op: route_model, models: [a, b]}
  gen_x: {op: generate, engine: x}
  gen_y: {op: generate, engine: y}
edges:
  - source -> choose
  - choose.a -> gen_x -> sink
  - choose.b -> gen_y -> sink
"""


def read(text: str) -> Graph:
    return yaml.load(text, file="two.yaml").graph


def found(text: str) -> list[Diagnostic]:
    return list(check(read(text), VOCABULARY, Facts()))


def test_a_graph_of_two_models_has_no_mistake() -> None:
    assert found(TWO) == []


def test_the_table_may_be_left_out() -> None:
    start, end = TWO.index("models:\n"), TWO.index("operators:")
    graph = read(TWO[:start] + TWO[end:])
    assert list(check(graph, VOCABULARY, Facts())) == []
    assert [(model.key, model.names) for model in served_models(graph)] == [
        ("a", ("a",)),
        ("b", ("b",)),
    ]


def test_a_model_has_names_engines_and_a_limit() -> None:
    assert served_models(read(TWO)) == (
        ServedModel("a", ("a", "small"), ("x",)),
        ServedModel("b", ("b",), ("y",), 64),
    )


def test_a_graph_without_route_model_serves_one_model_of_all_engines() -> None:
    graph = Graph("g", attrs=FrozenMap({"engines": freeze({"p": {}, "d": {}})}))
    assert served_models(graph) == (ServedModel("", (), ("p", "d")),)


@pytest.mark.parametrize(
    ("before", "after", "code", "says"),
    [
        ("choose.b ->", "choose.c ->", "unknown-outlet", "`choose` has no outlet `c`"),
        ("  - choose.b -> gen_y -> sink\n", "", "dangling-outlet", "`b` of `choose` leads nowhere"),
        ("[a, b]", "[a, b, c]", "dangling-outlet", "`c` of `choose` leads nowhere"),
        ("[a, b]", "[]", "bad-outlet", "lists nothing"),
        ("[a, b]", "[a, b, a]", "bad-outlet", "the outlet `a` 2 times"),
        ("[a, b]", "[a, b, terminal]", "bad-outlet", "`terminal` cannot name"),
        ("[a, b]", "[a, b, x/y]", "bad-outlet", "`x/y` cannot name"),
        ("max_model_len: 64", "max_model_length: 64", "unknown-option", "max_model_length"),
        ("max_model_len: 64", "max_model_len: 1", "out-of-range", "at least 2"),
        ("max_model_len: 64", "tasks: [embed]", "unbuilt-task", "no operator of the model embeds"),
        ("max_model_len: 64", "tasks: []", "wrong-value", "lists nothing"),
        ("max_model_len: 64", "aliases: [small]", "duplicate-model", "both called `small`"),
        ("max_model_len: 64", "name: a", "duplicate-model", "both called `a`"),
        ("aliases: [small]", "name: n, aliases: [b]", "duplicate-model", "both called `b`"),
        ("max_model_len: 64", 'name: ""', "wrong-value", "is empty"),
        ("  b: {max_model_len: 64}", "  b: {}\n  c: {}", "unrouted-model", "for the model `c`"),
        ("  b: {max_model_len: 64}\n", "", "unknown-model", "has no model `b`"),
    ],
)
def test_mistakes_are_found(before: str, after: str, code: str, says: str) -> None:
    assert before in TWO
    (mistake, *_) = found(TWO.replace(before, after))
    assert mistake.code == code
    assert says in mistake.message


def test_several_models_need_an_operator_that_chooses() -> None:
    text = TWO.replace("  choose: {op: route_model, models: [a, b]}\n", "")
    text = text.replace("  - choose.b -> gen_y -> sink\n", "").replace("choose.a -> ", "")
    text = text.replace("  - source -> choose\n  - gen_x", "  - source -> gen_x")
    text = text.replace("  gen_y: {op: generate, engine: y}\n", "").replace("  y: {}\n", "")
    (mistake,) = found(text)
    assert (mistake.code, mistake.path) == ("unrouted-model", ("models", "b"))


def test_an_engine_beside_the_outlets_is_found() -> None:
    edges = (Edge("source", "choose"), Edge("choose", "x", "a"), Edge("x", "sink"))
    nodes = (
        Node("choose", "route_model").with_attrs(models=("a",)),
        Node("x", "generate").with_attrs(engine="x"),
        Node("y", "generate").with_attrs(engine="y"),
    )
    attrs = FrozenMap({"engines": freeze({"x": {}, "y": {}})})
    behind = (Edge("source", "y"), Edge("y", "choose"), *edges[1:])
    wrong = check(Graph("g", "stream", nodes, behind, attrs), VOCABULARY, Facts())
    assert "unrouted-engine" in [one.code for one in wrong]


def test_the_table_is_written_and_read_again() -> None:
    graph = read(TWO)
    assert read(yaml.dump(graph)) == graph


def test_an_entry_that_is_no_mapping_is_a_mistake_of_form() -> None:
    with pytest.raises(GraphError, match="`b` must be a mapping"):
        read(TWO.replace("{max_model_len: 64}", "64"))
