"""Property tests: text forms and bytes give any graph back."""

from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, TensorType, freeze
from sagellm.graphs.text.codec import from_json, from_msgpack, to_json, to_msgpack
from sagellm.graphs.text.yaml import dump, load

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
).map(freeze)
names = st.from_regex(r"[A-Za-z_]([A-Za-z0-9_-]{0,4}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda name: name not in ("source", "sink")
)
options = st.dictionaries(
    texts.filter(lambda name: name not in ("op", "function")), values, max_size=3
)
tables = st.dictionaries(names, options.map(FrozenMap), max_size=3).map(FrozenMap)
shapes = st.lists(st.integers(0, 2**40) | texts, max_size=3).map(tuple)
types = st.none() | texts | st.builds(TensorType, shapes, texts)


@st.composite
def surface_graphs(draw: st.DrawFn) -> Graph:
    nodes = draw(
        st.lists(st.builds(Node, names, texts, options.map(FrozenMap)), unique_by=_name, max_size=4)
    )
    ports = names | st.sampled_from(["in", "out"])
    ends = st.sampled_from(["source", "sink", *(node.name for node in nodes)])
    edges = draw(st.lists(st.builds(Edge, ends, ends, ports, ports, st.booleans()), max_size=6))
    kinds = options.map(lambda chosen: FrozenMap({**chosen, "kind": "tasks"}))
    budgets = options.map(FrozenMap)
    optional = {"engines": tables, "budgets": budgets, "executor": kinds}
    attrs = draw(st.fixed_dictionaries({}, optional=optional))
    return Graph(draw(texts), "stream", tuple(nodes), tuple(edges), FrozenMap(attrs))


def _name(node: Node) -> str:
    return node.name


def lowered(bodies: st.SearchStrategy[Graph | None]) -> st.SearchStrategy[Graph]:
    nodes = st.builds(Node, texts, texts, options.map(FrozenMap), bodies)
    edges = st.builds(Edge, texts, texts, texts, texts, st.booleans(), types)
    parts = st.lists(nodes, max_size=3).map(tuple), st.lists(edges, max_size=3).map(tuple)
    return st.builds(Graph, texts, texts, *parts, options.map(FrozenMap))


any_graphs = lowered(st.none() | lowered(st.none()))


@settings(deadline=None, max_examples=30)
@given(surface_graphs())
def test_yaml_gives_the_graph_back(graph: Graph) -> None:
    again = load(dump(graph), file="x").graph
    assert again == graph
    assert again.names == graph.names
    assert again.hash == graph.hash


@settings(deadline=None, max_examples=30)
@given(any_graphs)
def test_json_and_messagepack_give_the_graph_back(graph: Graph) -> None:
    for again in (from_json(to_json(graph)), from_msgpack(to_msgpack(graph))):
        assert again == graph
        assert again.hash == graph.hash


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=60) | any_graphs.map(to_msgpack).map(lambda whole: whole[:-1]))
def test_broken_bytes_are_a_graph_or_a_graph_error(content: bytes) -> None:
    for read in (from_json, from_msgpack):
        with suppress(GraphError):
            assert isinstance(read(content), Graph)
