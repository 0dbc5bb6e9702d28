"""Reading the YAML form: the graph, its positions, and mistakes of form."""

from pathlib import Path

import pytest

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Position
from sagellm.graphs.ir import Edge, FrozenMap, Node
from sagellm.graphs.text.yaml import load, load_file

TEXT = """\
sagellm: 1
name: small
engines:
  g: {model: sage-tiny}
operators:
  sort: {op: policy_sort, window: 4}
  split: {op: pd_split}
edges:
  - source -> sort -> split
  - split.aggregated -> sink
  - "split ~> sort.load"
executor: {kind: tasks}
"""


def mistakes(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(GraphError) as caught:
        load(text, file="f.yaml")
    return caught.value.diagnostics


def only(text: str) -> tuple[str, int, int]:
    (found,) = mistakes(text)
    assert found.position is not None
    assert found.hint
    return found.code, found.position.line, found.position.column


def test_a_file_becomes_a_graph() -> None:
    graph = load(TEXT, file="f.yaml").graph
    assert (graph.name, graph.dialect) == ("small", "stream")
    assert graph.engines == {"g": FrozenMap({"model": "sage-tiny"})}
    assert graph.attrs["executor"] == {"kind": "tasks"}
    assert graph.nodes == (
        Node("sort", "policy_sort", FrozenMap({"window": 4})),
        Node("split", "pd_split"),
    )
    assert graph.edges == (
        Edge("source", "sort"),
        Edge("sort", "split"),
        Edge("split", "sink", outlet="aggregated"),
        Edge("split", "sort", inlet="load", feedback=True),
    )


def test_positions_tell_keys_values_and_ends_of_edges() -> None:
    positions = load(TEXT, file="f.yaml").positions
    expected = {
        ("operators", "sort"): (6, 3),
        ("operators", "sort", "window"): (6, 27),
        ("operators", "sort", "window", "value"): (6, 35),
        ("engines", "g", "model", "value"): (4, 14),
        ("edges", 1, "source"): (9, 15),
        ("edges", 1, "target"): (9, 23),
        ("edges", 2): (10, 5),
        ("edges", 2, "outlet"): (10, 11),
        ("edges", 3, "source"): (11, 6),
        ("edges", 3, "inlet"): (11, 20),
    }
    found = {path: (positions[path].line, positions[path].column) for path in expected}
    assert found == expected


def test_positions_are_no_part_of_the_graph() -> None:
    moved = load("# a line more\n" + TEXT, file="other.yaml")
    assert moved.graph.hash == load(TEXT, file="f.yaml").graph.hash
    assert moved.graph == load(TEXT, file="f.yaml").graph


def test_order_is_kept() -> None:
    text = "sagellm: 1\nname: x\noperators: {b: {op: x}, a: {op: x}}\nedges: []\n"
    assert load(text, file="f").graph.names == ("b", "a")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("0o17", 15),
        ("0x1f", 31),
        ("-3", -3),
        ("007", 7),
        ("1_000", "1_000"),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("2001-01-01", "2001-01-01"),
        ("'5'", "5"),
        ("[1, [two]]", (1, ("two",))),
        ("{x: 1}", FrozenMap({"x": 1})),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: object) -> None:
    graph = load(TEXT.replace("window: 4", f"window: {written}"), file="f").graph
    found = graph.node("sort").attrs["window"]
    assert found == value
    assert type(found) is type(value)


def test_an_alias_repeats_a_value() -> None:
    text = TEXT.replace("g: {model: sage-tiny}", "g: &g {model: sage-tiny}\n  h: *g")
    assert load(text, file="f").graph.engines["h"] == {"model": "sage-tiny"}


def test_a_folded_chain_is_placed_at_its_beginning() -> None:
    text = TEXT.replace("- source -> sort -> split", "- >\n    source -> sort\n    -> split")
    document = load(text, file="f")
    assert document.graph.edges[1] == Edge("sort", "split")
    assert document.positions["edges", 1] == Position("f", 9, 5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("sagellm: 1", "sagellm: 2", ("bad-version", 1, 10)),
        ("sagellm: 1", "sagellm: true", ("bad-version", 1, 10)),
        ("name: small", "name: 5", ("bad-form", 2, 7)),
        ("name: small\n", "", ("missing-key", 1, 1)),
        ("executor:", "exector:", ("unknown-key", 12, 1)),
        ("{kind: tasks}", "tasks", ("bad-form", 12, 11)),
        ("{kind: tasks}", "{}", ("missing-key", 12, 1)),
        ("g: {model: sage-tiny}", "g: sage-tiny", ("bad-form", 4, 6)),
        ("g: {model: sage-tiny}", "g.1: {}", ("bad-name", 4, 3)),
        ("split: {op: pd_split}", "split: pd_split", ("bad-form", 7, 10)),
        ("split: {op: pd_split}", "split: {opp: pd_split}", ("missing-key", 7, 3)),
        ("split: {op: pd_split}", "split: {op: 3}", ("bad-form", 7, 15)),
        ("split: {op: pd_split}", "sink: {op: pd_split}", ("reserved-name", 7, 3)),
        ("split: {op: pd_split}", "a.b: {op: pd_split}", ("bad-name", 7, 3)),
        ("window: 4", "window: 4, window: 5", ("duplicate-key", 6, 38)),
        ("window: 4", "window: .nan", ("not-finite", 6, 35)),
        ("window: 4", "window: 1e999", ("not-finite", 6, 35)),
        ("window: 4", f"window: {2**63}", ("too-large", 6, 35)),
        ("window: 4", 'window: "\\ud800"', ("bad-text", 6, 35)),
        ("window: 4", "window: !!python/object:os.system ls", ("tag", 6, 35)),
        ("window: 4", "window: !!int 4", ("tag", 6, 35)),
        ("window: 4", "window: *w", ("unknown-alias", 6, 35)),
        ("window: 4", "1: 4", ("bad-key", 6, 27)),
        ("window: 4", "? [a] : 4", ("bad-key", 6, 29)),
        ("window: 4", "<<: {a: 1}", ("bad-key", 6, 27)),
        ("- source -> sort -> split", "- source => sort", ("bad-edge", 9, 5)),
        ("- source -> sort -> split", "- source ->  -> split", ("bad-edge", 9, 14)),
        ("- source -> sort -> split", "- source -> so rt -> split", ("bad-edge", 9, 15)),
        ("- source -> sort -> split", "- source -> sort.out -> split", ("bad-edge", 9, 20)),
        ("- source -> sort -> split", "- {source: sort}", ("bad-form", 9, 5)),
    ],
)
def test_a_mistake_of_form_has_its_place(
    old: str, new: str, expected: tuple[str, int, int]
) -> None:
    assert old in TEXT
    assert only(TEXT.replace(old, new)) == expected


def test_a_dotted_name_between_arrows_is_explained() -> None:
    (found,) = mistakes(TEXT.replace("-> sort -> split", "-> split.aggregated -> sort"))
    assert "inlet or an outlet" in found.message
    assert found.hint == "write two edges: `source -> split` and `split.aggregated -> ...`"


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("", 1, 1),
        ("a: [1", 1, 6),
        ("a: 1\n\tb: 2", 2, 1),
        ("a: b: c", 1, 5),
        ("a: 1\n---\nb: 2", 2, 1),
        ("a: \x01", 1, 4),
        ("- source -> sink", 1, 1),
    ],
)
def test_a_text_that_is_no_mapping_is_refused(text: str, line: int, column: int) -> None:
    found = mistakes(text)[-1]
    assert found.position == Position("f.yaml", line, column)


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("a: {b: 1\nc: 2\n", (2, 2), "line 1 is not closed"),
        ("a: 'x\nb: 1\n", (3, 1), "quote in line 1"),
        ("a:\n  - b\n c: 1\n", (3, 2), "indentation against line 1"),
        ("a:\n\t- b\n", (2, 1), "not with tabs"),
        ("a: b: c\n", (1, 5), "quote a text"),
        ("a: @b\n", (1, 4), "quote the text"),
        ('a: "\\q"\n', (1, 6), "double the backslash"),
    ],
)
def test_broken_yaml_comes_with_a_hint(text: str, place: tuple[int, int], hint: str) -> None:
    (found,) = mistakes(text)
    assert found.position == Position("f.yaml", *place)
    assert found.hint is not None
    assert hint in found.hint


def test_all_mistakes_are_told_in_the_order_of_lines() -> None:
    text = TEXT.replace("executor:", "exector:").replace("op: pd_split", "oops: 1")
    found = mistakes(text.replace("- source ->", "- source =>"))
    assert [each.position.line for each in found if each.position] == [7, 9, 12]


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("small", "größe").encode())
    document = load_file(path)
    assert document.graph.name == "größe"
    assert document.positions["name",].file == str(path)


def test_another_encoding_is_refused_at_its_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "graph.yaml"
    path.write_bytes("sagellm: 1\nname: größe\n".encode("latin-1"))
    with pytest.raises(GraphError, match=r"graph\.yaml:2:9: this byte is not UTF-8"):
        load_file(str(path))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none.yaml")


def test_an_operator_without_op_is_not_told_to_add_its_own_name() -> None:
    with pytest.raises(GraphError) as raised:
        load(TEXT.replace("split: {op: pd_split}", "split: {x: 1}"), file="small.yaml")
    assert raised.value.diagnostics[0].hint == (
        "add `op:` with the name of an operator, such as `op: generate`"
    )
