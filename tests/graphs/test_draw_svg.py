"""The SVG picture: well-formed XML, text inside its box, no label on another, no line across."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
from pictures import crosses, holds, overlap

import sagellm.graphs
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node
from sagellm.graphs.kernels import infer
from sagellm.graphs.layout.ranks import Box, Point
from sagellm.graphs.models import FAMILIES, build
from sagellm.graphs.passes import KERNEL_PASSES, run_pipeline
from sagellm.graphs.passes.placement import Place
from sagellm.graphs.text.draw import as_svg
from sagellm.graphs.text.svg import FONT_SIZE, LABEL_SIZE, text_width
from sagellm.graphs.text.yaml import load_file

FOLDER = Path(sagellm.graphs.__file__).parent
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PD = load_file(FOLDER / "pd.yaml").graph
SVG = "{http://www.w3.org/2000/svg}"
CONFIG = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Seen:
    """The parts of a picture: text in boxes and titles, labels of edges, boxes, frames, lines."""

    words: tuple[tuple[str, Box], ...]
    labels: tuple[tuple[str, Box], ...]
    boxes: tuple[Box, ...]
    frames: tuple[Box, ...]
    lines: tuple[tuple[Point, ...], ...]
    size: tuple[float, float]


def seen(picture: str) -> Seen:
    root = ET.fromstring(picture)
    words, labels = [], []
    for found in root.iter(f"{SVG}text"):
        is_label = "label" in found.attrib["class"].split()
        (labels if is_label else words).append((found.text or "", text_box(found, is_label)))
    boxes = [(found.attrib["class"], rectangle(found)) for found in root.iter(f"{SVG}rect")]
    lines = [points(found.attrib["d"]) for found in root.iter(f"{SVG}path") if is_edge(found)]
    return Seen(
        tuple(words),
        tuple(labels),
        tuple(box for kind, box in boxes if kind in ("operator", "engine", "end")),
        tuple(box for kind, box in boxes if kind == "frame"),
        tuple(lines),
        (float(root.attrib["width"]), float(root.attrib["height"])),
    )


def is_edge(path: ET.Element) -> bool:
    return "edge" in path.attrib["class"].split()


def rectangle(found: ET.Element) -> Box:
    """A rectangle; None for `paper`, which is as large as the picture."""
    return Box(*(float(found.attrib.get(name, "0").strip("%")) for name in NAMES))


NAMES = ("x", "y", "width", "height")


def text_box(found: ET.Element, is_label: bool) -> Box:
    x, y = float(found.attrib["x"]), float(found.attrib["y"])
    size = LABEL_SIZE if is_label else FONT_SIZE
    width = text_width(found.text or "", size)
    return Box(x - width / 2 if is_label else x, y - size * 0.8, width, size)


def points(path: str) -> tuple[Point, ...]:
    """A path as a fine polyline."""
    steps = re.findall(r"([MLC])([^MLC]*)", path)
    found: list[Point] = []
    for letter, text in steps:
        numbers = [float(number) for number in re.split(r"[ ,]", text.strip())]
        ends = list(zip(numbers[::2], numbers[1::2], strict=True))
        found += ends if letter != "C" else curve(found[-1], *ends)
    return tuple(found)


def curve(p: Point, q: Point, r: Point, s: Point) -> Iterator[Point]:
    for step in range(1, 33):
        t, u = step / 32, 1 - step / 32
        weights = u**3, 3 * u * u * t, 3 * u * t * t, t**3
        yield (
            sum(w * point[0] for w, point in zip(weights, (p, q, r, s), strict=True)),
            sum(w * point[1] for w, point in zip(weights, (p, q, r, s), strict=True)),
        )


def check_picture(picture: str) -> None:
    """Check every property of a picture."""
    shown = seen(picture)
    labels = [box for _, box in shown.labels]
    titles = [box for _, box in shown.words if not any(holds(one, box) for one in shown.boxes)]
    texts = [box for _, box in shown.words]
    assert all(any(holds(frame, title) for frame in shown.frames) for title in titles)
    assert len(titles) == len(shown.frames)
    assert not any(overlap(*pair) for pair in combinations([*labels, *texts], 2))
    assert not any(overlap(text, box) for text in (*labels, *titles) for box in shown.boxes)
    solid = [*shown.boxes, *labels, *titles]
    assert not any(crosses(line, box) for line in shown.lines for box in solid)
    paper = Box(0, 0, *shown.size)
    assert all(holds(paper, box) for box in (*solid, *shown.frames))
    for frame in shown.frames:
        partly = [box for box in solid if overlap(frame, box) and not holds(frame, box)]
        assert not partly


def kernels(architecture: str, *, fused: bool, **changes: object) -> Graph:
    graph = build({"architectures": [architecture], **CONFIG, **changes})
    return infer(run_pipeline(graph, KERNEL_PASSES) if fused else graph)


def shipped(name: str, **executor: str) -> Graph:
    graph = load_file(FOLDER / f"{name}.yaml").graph
    given = {"executor": FrozenMap(executor)} if executor else {}
    return replace(graph, attrs=FrozenMap({**graph.attrs, **given}))


@pytest.mark.parametrize("unfold", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_kernels_of_every_family(architecture: str, fused: bool, unfold: bool) -> None:
    check_picture(as_svg(kernels(architecture, fused=fused), unfold=unfold))


@pytest.mark.parametrize("stop_after", [step.name for step in KERNEL_PASSES])
def test_kernels_after_every_pass(stop_after: str) -> None:
    graph = build({"architectures": ["Qwen3ForCausalLM"], **CONFIG})
    check_picture(as_svg(infer(run_pipeline(graph, KERNEL_PASSES, stop_after=stop_after))))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_graphs(name: str) -> None:
    check_picture(as_svg(shipped(name)))


@pytest.mark.parametrize("unfold", [False, True])
@pytest.mark.parametrize("executor", [{"kind": "tasks"}, {"kind": "processes", "address": "ipc"}])
@pytest.mark.parametrize("name", SHIPPED)
def test_processes_of_shipped_graphs(name: str, executor: dict[str, str], unfold: bool) -> None:
    check_picture(as_svg(Place().apply(shipped(name, **executor)), unfold=unfold))


def test_wide_letters_stay_in_their_box() -> None:
    node = Node("\u691c\u7d22" * 8, "map", FrozenMap({"x": "\U0001f600" * 9}))
    picture = as_svg(Graph("wide", nodes=(node,)))
    check_picture(picture)
    (box,) = seen(picture).boxes
    assert box.width >= 16 * FONT_SIZE


@pytest.mark.parametrize(
    "edges",
    [
        (Edge("a", "a", "again", feedback=True), Edge("a", "a", "more"), Edge("a", "b")),
        (Edge("a", "b", "one"), Edge("a", "b", "other", "inlet"), Edge("a", "b")),
        (Edge("a", "b"), Edge("b", "c"), Edge("c", "a", "back", feedback=True)),
        (Edge("a", "b"), Edge("b", "c"), Edge("c", "a"), Edge("b", "a", feedback=True)),
    ],
)
def test_loops_and_parallel_edges(edges: tuple[Edge, ...]) -> None:
    nodes = (Node("a", "map"), Node("b", "map"), Node("c", "policy_sort"))
    check_picture(as_svg(Graph("x", nodes=nodes, edges=edges)))


def texts(picture: str) -> list[str]:
    return [found.text or "" for found in ET.fromstring(picture).iter(f"{SVG}text")]


def test_every_operator_and_outlet_is_named_once() -> None:
    said = texts(as_svg(PD))
    assert all(said.count(name) == 1 for name in (*PD.names, "source", "sink"))
    assert said.count("disaggregated") == said.count("aggregated") == 1
    assert "policy: slo_aware" in said


def test_the_longest_path_is_one_straight_line() -> None:
    shown = seen(as_svg(kernels("Qwen3ForCausalLM", fused=False), unfold=True))
    middles = {round(box.centre) for box in shown.boxes}
    main = max(middles, key=lambda x: sum(round(box.centre) == x for box in shown.boxes))
    assert sum(round(box.centre) == main for box in shown.boxes) >= len(shown.boxes) // 2


def test_repeated_layers_are_one_frame() -> None:
    graph = kernels("LlamaForCausalLM", fused=False)
    folded, whole = texts(as_svg(graph)), texts(as_svg(graph, unfold=True))
    assert "layers 0-3: x 4" in folded
    assert [text for text in whole if text.startswith("layer")] == [f"layer {n}" for n in range(4)]
    assert (folded.count("q_proj"), whole.count("q_proj")) == (1, 4)


def test_workers_are_counted_and_their_links_named() -> None:
    placed = Place().apply(shipped("pd_many", kind="processes", address="tcp://a:1", kv="nixl"))
    said = texts(as_svg(placed))
    assert (said.count("worker p: x 2"), said.count("tcp")) == (1, 3)
    assert said.count("KV blocks: nixl") == 1
    whole = texts(as_svg(placed, unfold=True))
    assert [text for text in whole if text.startswith("worker")] == [
        *("worker p[0]", "worker p[1]", "worker d[0]", "worker d[1]")
    ]
    assert whole.count("KV blocks: nixl") == 4


def test_under_tasks_all_is_in_one_frame() -> None:
    shown = seen(as_svg(Place().apply(PD)))
    (frame,) = shown.frames
    assert all(holds(frame, box) for box in shown.boxes)
    assert {"one process: executor tasks", "engine p", "engine d"} <= {
        word for word, _ in shown.words
    }


def test_workers_stand_outside_of_the_frame_of_the_graph() -> None:
    shown = seen(as_svg(Place().apply(shipped("pd", kind="processes"))))
    (frame,) = shown.frames
    assert sum(not overlap(frame, box) for box in shown.boxes) == 2


def test_dark_and_light_pages_have_their_colours() -> None:
    picture = as_svg(PD)
    light, dark = picture.split("@media (prefers-color-scheme:dark)")
    assert ".paper{fill:#ffffff}" in light
    assert ".paper{fill:#0d1117}" in dark


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


def test_boxes_of_kernels_list_their_step_inputs() -> None:
    edges = (Edge("source", "rope", "positions", "positions"), Edge("rope", "sink", inlet="rows"))
    said = texts(as_svg(Graph("k", "kernel", (Node("rope", "rope"),), edges)))
    assert "source" not in said
    assert "from source: positions" in said


@pytest.mark.parametrize(
    "graph",
    [
        Graph("x"),
        Place().apply(Graph("x")),
        Graph("x", "kernel"),
        Graph("x", edges=(Edge("source", "gone"),)),
    ],
)
def test_a_graph_with_mistakes_is_drawn_as_far_as_it_goes(graph: Graph) -> None:
    assert as_svg(graph).startswith("<svg ")
