"""The layered layout: rows, order and lines, for any boxes, edges, labels and frames."""

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import crosses, holds, overlap

from sagellm.graphs.layout.grid import num_crossings
from sagellm.graphs.layout.layers import FRAME_PADDING, PORT_GAP, lay_out, spread
from sagellm.graphs.layout.ranks import (
    Band,
    Box,
    GridCell,
    Layout,
    LayoutEdge,
    ranks,
    shortcuts,
    spine,
)

SIZE = (60.0, 30.0)
CHAIN = [LayoutEdge("a", "b"), LayoutEdge("b", "c"), LayoutEdge("a", "c")]


def test_rows_go_down_along_edges() -> None:
    links = [*CHAIN, LayoutEdge("c", "a", is_back=True)]
    layout = lay_out(dict.fromkeys("cba", SIZE), links)
    assert layout.boxes["a"].bottom < layout.boxes["b"].y
    assert layout.boxes["b"].bottom < layout.boxes["c"].y
    assert [goes_down(layout, number) for number in range(4)] == [True, True, True, False]


def goes_down(layout: Layout, number: int) -> bool:
    route = layout.routes[number]
    return route.strokes[0][0][1] < route.strokes[-1][-1][1]


def test_edges_end_at_their_boxes() -> None:
    layout = lay_out(dict.fromkeys("abc", SIZE), CHAIN)
    route = layout.routes[2]
    assert route.strokes[0][0][1] == layout.boxes["a"].bottom
    assert route.strokes[-1][-1][1] == layout.boxes["c"].y


def test_parallel_edges_run_apart() -> None:
    layout = lay_out({"a": SIZE, "b": SIZE}, [LayoutEdge("a", "b"), LayoutEdge("a", "b")])
    starts = sorted(route.strokes[0][0][0] for route in layout.routes)
    assert starts[1] - starts[0] >= PORT_GAP


def test_a_label_interrupts_its_edge() -> None:
    layout = lay_out({"a": SIZE, "b": SIZE}, [LayoutEdge("a", "b", label_width=40.0)])
    (route,) = layout.routes
    assert route.label is not None
    above, below = route.strokes
    assert (above[-1][1], below[0][1]) == (route.label.y, route.label.bottom)


def test_a_label_stands_by_the_end_that_it_names() -> None:
    links = [*CHAIN[:2], LayoutEdge("a", "c", label_width=40.0)]
    near = lay_out(dict.fromkeys("abc", SIZE), links)
    far = lay_out(dict.fromkeys("abc", SIZE), [*links[:2], LayoutEdge("a", "c", False, 40.0, True)])
    first, second = near.routes[2].label, far.routes[2].label
    assert first is not None
    assert second is not None
    assert first.bottom < near.boxes["b"].y
    assert second.y > far.boxes["b"].bottom


def test_what_a_band_feeds_is_below_all_of_it() -> None:
    links = [LayoutEdge("before", "a"), LayoutEdge("a", "b"), LayoutEdge("a", "after")]
    names = ["before", "a", "b", "after", "title"]
    rank = ranks(names, links, [Band("title", ("a", "b"))])
    assert sorted(names, key=lambda name: rank[name]) == ["before", "title", "a", "b", "after"]


def test_an_edge_beside_a_longer_path_is_a_shortcut() -> None:
    assert shortcuts({"a": 0, "b": 1, "c": 2}, CHAIN) == {2}


def test_the_longest_path_is_the_spine() -> None:
    links = [*CHAIN, LayoutEdge("c", "d", priority=1)]
    assert spine({"a": 0, "b": 1, "c": 2, "d": 3}, links) == {0, 1}


def test_the_spine_is_straight_and_what_is_beside_it_does_not_bend_it() -> None:
    links = [
        LayoutEdge("a", "b"),
        LayoutEdge("b", "c"),
        LayoutEdge("a", "x"),
        LayoutEdge("x", "c"),
        LayoutEdge("c", "d"),
    ]
    links += [LayoutEdge("b", "b2"), LayoutEdge("b2", "c")]
    boxes = lay_out(dict.fromkeys(["a", "b", "b2", "c", "d", "x"], SIZE), links).boxes
    assert len({boxes[name].centre for name in ("a", "b", "b2", "c", "d")}) == 1
    assert boxes["x"].centre != boxes["a"].centre


def test_crossings_are_counted_and_avoided() -> None:
    rows = [["a", "b"], ["c", "d"]]
    lower: dict[GridCell, list[GridCell]] = {"a": ["d"], "b": ["c"], "c": [], "d": []}
    assert num_crossings(rows, lower) == 1
    layout = lay_out(dict.fromkeys("abcd", SIZE), [LayoutEdge("a", "d"), LayoutEdge("b", "c")])
    left, right = (
        layout.boxes["a"].x < layout.boxes["b"].x,
        layout.boxes["d"].x < layout.boxes["c"].x,
    )
    assert left == right


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=8), st.floats(20, 300))
def test_ports_are_apart_and_on_their_side(wish: list[float], width: float) -> None:
    ports = spread(sorted(wish), 0.0, width)
    assert all(-width / 2 < port < width / 2 for port in ports)
    least = min(PORT_GAP, width / (len(wish) + 1))
    assert all(right - left >= least - 1e-6 for left, right in pairwise(ports))


def test_a_port_is_straight_below_what_it_comes_from() -> None:
    assert spread([10.0, 400.0], 0.0, 100.0) == [10.0, 42.0]


sizes = st.dictionaries(
    st.sampled_from("abcdefgh"), st.tuples(st.floats(40, 200), st.floats(20, 90)), min_size=1
)
widths = st.sampled_from([0.0, 0.0, 30.0, 110.0])


@settings(deadline=None, max_examples=120)
@given(sizes, st.data())
def test_boxes_and_labels_never_overlap_and_edges_cross_none(
    sizes: dict[str, tuple[float, float]], data: st.DataObject
) -> None:
    ends = st.sampled_from(sorted(sizes))
    link = st.builds(
        LayoutEdge, ends, ends, st.booleans(), widths, st.booleans(), st.integers(0, 2)
    )
    links = data.draw(st.lists(link, max_size=12))
    members = data.draw(st.sets(ends))
    bands = [Band("title", tuple(sorted(members)))] if members else []
    layout = lay_out({**sizes, **({"title": (90.0, 16.0)} if bands else {})}, links, bands)
    labels = [route.label for route in layout.routes if route.label]
    assert len(labels) == sum(link.label_width > 0 for link in links)
    check(layout, labels)
    for band in bands:
        held = [layout.boxes[name] for name in (band.title, *band.members)]
        frame = layout.frames[band.title]
        assert all(holds(frame, box) for box in held)
        beside = [link.is_loop and link.source not in members for link in links]
        near = [
            route.label
            for route, is_beside in zip(layout.routes, beside, strict=True)
            if route.label and not is_beside
        ]
        assert not any(overlap(frame, box) and not holds(frame, box) for box in near)


def check(layout: Layout, labels: list[Box]) -> None:
    solid = [*layout.boxes.values(), *labels]
    assert not any(overlap(*pair) for pair in combinations(solid, 2))
    lines = [stroke for route in layout.routes for stroke in route.strokes]
    assert not any(crosses(line, box) for line in lines for box in solid)
    paper = Box(0, 0, layout.width, layout.height)
    assert all(holds(paper, box) for box in (*solid, *layout.frames.values()))


def test_a_frame_keeps_its_distance_from_what_it_holds() -> None:
    layout = lay_out({"title": SIZE, "a": SIZE}, [], [Band("title", ("a",))])
    frame, box = layout.frames["title"], layout.boxes["a"]
    assert box.x - frame.x == FRAME_PADDING
    assert frame.bottom - box.bottom == FRAME_PADDING
