"""The SVG picture: well-formed XML, boxes apart, labels in place, feedback dashed."""

import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sagellm.graphs
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node
from sagellm.graphs.text.draw import as_svg
from sagellm.graphs.text.layers import Box, Link, lay_out
from sagellm.graphs.text.yaml import load_file

FOLDER = Path(sagellm.graphs.__file__).parent
PD = load_file(FOLDER / "pd.yaml").graph
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [found.text or "" for found in ET.fromstring(picture).iter(f"{SVG}text")]


def overlap(one: Box, other: Box) -> bool:
    apart = one.x + one.width <= other.x or other.x + other.width <= one.x
    return not (apart or one.bottom <= other.y or other.bottom <= one.y)


def test_every_operator_and_outlet_is_named_once() -> None:
    said = texts(as_svg(PD))
    assert all(said.count(name) == 1 for name in (*PD.names, "source", "sink"))
    assert said.count("disaggregated") == said.count("joint") == 1
    assert "policy: slo_aware" in said


def test_the_picture_holds_every_box() -> None:
    root = ET.fromstring(as_svg(PD))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for found in root.iter(f"{SVG}rect"):
        if "class" in found.attrib:
            assert float(found.attrib["x"]) + float(found.attrib["width"]) <= width
            assert float(found.attrib["y"]) + float(found.attrib["height"]) <= height


def test_feedback_is_dashed_and_all_edges_have_heads() -> None:
    graph = Graph("x", nodes=(Node("a", "map"),), edges=(Edge("a", "a", feedback=True),))
    assert as_svg(graph).count('class="edge feedback"') == 1
    assert as_svg(PD).count('class="edge feedback"') == 0
    assert as_svg(PD).count("marker-end") == len(PD.edges)


def test_names_are_escaped() -> None:
    node = Node("<script>&", "map", FrozenMap({"x": "</text><script>"}))
    said = texts(as_svg(Graph('"<title>', nodes=(node,))))
    assert "<script>&" in said
    assert said[-1] == 'x: "</text><script>"'


def test_what_kernels_take_from_source_is_written_in_them() -> None:
    edges = (Edge("source", "rope", "positions", "positions"), Edge("rope", "sink", inlet="rows"))
    said = texts(as_svg(Graph("k", "kernel", (Node("rope", "rope"),), edges)))
    assert "source" not in said
    assert "from source: positions" in said


@pytest.mark.parametrize("graph", [Graph("x"), Graph("x", edges=(Edge("source", "gone"),))])
def test_a_graph_with_mistakes_is_drawn_as_far_as_it_goes(graph: Graph) -> None:
    assert as_svg(graph).startswith("<svg ")


def test_rows_go_down_along_edges() -> None:
    links = [Link("a", "b"), Link("b", "c"), Link("a", "c"), Link("c", "a", is_back=True)]
    layout = lay_out(dict.fromkeys("cba", (60.0, 30.0)), links)
    assert layout.boxes["a"].bottom < layout.boxes["b"].y
    assert layout.boxes["b"].bottom < layout.boxes["c"].y
    assert [route.is_back for route in layout.routes] == [False, False, False, True]


def test_parallel_edges_run_apart() -> None:
    layout = lay_out({"a": (60.0, 30.0), "b": (60.0, 30.0)}, [Link("a", "b"), Link("a", "b")])
    first, second = layout.routes
    assert first.points[0][0] < second.points[0][0]
    assert first.points[-1][0] < second.points[-1][0]


sizes = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.floats(20, 200), st.floats(20, 90)), min_size=1
)


@settings(deadline=None, max_examples=60)
@given(sizes, st.data())
def test_boxes_never_overlap_and_edges_cross_none(
    sizes: dict[str, tuple[float, float]], data: st.DataObject
) -> None:
    ends = st.sampled_from(sorted(sizes))
    links = data.draw(st.lists(st.builds(Link, ends, ends, st.booleans()), max_size=12))
    layout = lay_out(sizes, links)
    assert not any(overlap(*pair) for pair in combinations(layout.boxes.values(), 2))
    for link, route in zip(links, layout.routes, strict=True):
        passed = [
            box for name, box in layout.boxes.items() if name not in (link.source, link.target)
        ]
        if not route.is_back:
            assert not any(inside(box, point) for box in passed for point in route.points)


def inside(box: Box, point: tuple[float, float]) -> bool:
    return box.x < point[0] < box.x + box.width and box.y < point[1] < box.bottom
