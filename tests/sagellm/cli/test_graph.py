import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sagellm.cli import main
from sagellm.opening.sources import shipped_names

WRONG = """\
sagellm: 1
name: wrong
engines:
  g: {model: sage-tiny}
operators:
  sort: {op: policy_sort, polcy: fifo}
  generate: {op: generat, engine: g}
edges:
  - source -> sort -> generate -> sink
"""


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    return str(path)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_graph_is_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "check", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ok")


def test_mistakes_have_line_and_hint(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "check", wrong]) == 2
    shown = capsys.readouterr().err
    assert f"{wrong}:6:" in shown
    assert "policy" in shown
    assert f"{wrong}:7:" in shown
    assert "generate" in shown


def test_mistakes_as_json(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "check", wrong, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert {mistake["line"] for mistake in found["mistakes"]} == {6, 7}


def test_a_right_graph_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "check", "pd", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["name"], len(found["hash"])) == (True, "pd", 16)


def test_check_sees_what_set_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "check", "pd", "--set", "p.block_size=32"]) == 2
    assert "block" in capsys.readouterr().err


def test_show_prints_operators_and_edges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "show", "pd"]) == 0
    shown = capsys.readouterr().out
    assert "policy_sort" in shown
    assert "split.aggregated -> generate" in shown


def test_show_draws_mermaid(capsys: pytest.CaptureFixture[str]) -> None:
    main(["graph", "show", "pd", "--format", "mermaid"])
    assert capsys.readouterr().out.startswith("flowchart")


@pytest.mark.parametrize("what", ["pd", "sage-tiny"])
def test_show_draws_svg(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["graph", "show", what, "--format", "svg"])
    assert ElementTree.fromstring(capsys.readouterr().out).tag.endswith("svg")


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["graph", "show", *argv]) == 0
    return capsys.readouterr().out


def unescape(mermaid: str) -> str:
    return mermaid.replace("#91;", "[").replace("#93;", "]")


FORMATS = ("text", "mermaid", "svg")


@pytest.mark.parametrize("format", FORMATS)
def test_layers_are_folded_unless_asked_for(
    format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folded = shown(capsys, "sage-tiny", "--format", format)
    whole = shown(capsys, "sage-tiny", "--format", format, "--unfold")
    assert ("layers 0-4: x 5" in folded, "layers 0-4" in whole) == (True, False)
    assert all(f"layer {n}" in whole for n in range(5))


@pytest.mark.parametrize("format", FORMATS)
def test_place_shows_processes_and_links(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["pd_many", "--after", "place", "--format", format, "--executor", "processes"]
    drawn = shown(capsys, *argv, "--set", "executor.kv=tcp")
    assert all(text in drawn for text in ("x 2", "ipc", "KV blocks: tcp"))
    whole = unescape(shown(capsys, *argv, "--unfold"))
    assert ("d[1]" in unescape(drawn), "d[1]" in whole) == (False, True)


@pytest.mark.parametrize("format", FORMATS)
def test_place_under_tasks_is_one_process(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = shown(capsys, "pd", "--after", "place", "--format", format)
    assert ("engine" in drawn, "worker" in drawn, "ipc" in drawn) == (True, False, False)


@pytest.mark.parametrize(
    ("what", "before", "after"),
    [("fuse_qkv", "layer0_q_proj", "layer0_qkv"), ("fuse_gate_up", "gate_proj", "gate_up")],
)
def test_fusion_is_seen(
    what: str, before: str, after: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["graph", "show", "sage-tiny"])
    built = capsys.readouterr().out
    main(["graph", "show", "sage-tiny", "--after", what])
    fused = capsys.readouterr().out
    assert (before in built, after in built) == (True, False)
    assert after in fused


def test_the_graph_of_an_operators_engine_is_that_of_its_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["graph", "show", "pd", "--node", "prefill"])
    through_graph = capsys.readouterr().out
    main(["graph", "show", "sage-tiny"])
    assert capsys.readouterr().out == through_graph


def test_after_a_pass_engines_show_their_one_body(capsys: pytest.CaptureFixture[str]) -> None:
    main(["graph", "show", "pd", "--after", "attach_bodies"])
    shown = capsys.readouterr().out
    assert shown.startswith("stream graph pd")
    assert shown.count("\nkernel graph ") == 1


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        (["pdd"], "did you mean pd?"),
        (["pd", "--after", "fuse_qvk"], "did you mean fuse_qkv?"),
        (["pd", "--node", "prefil"], "did you mean prefill?"),
        (["pd", "--node", "sort"], "has no engine"),
        (["sage-tiny", "--node", "prefill"], "this is a model"),
        (["sage-tiny", "--executor", "tasks"], "this is a model"),
        (["pd", "--executor", "proceses"], "did you mean `processes`?"),
        (["pd", "--after", "place", "--set", "executor.kvv=tcp"], "no option `kvv`"),
        (["sage-tny"], "did you mean sage-tiny?"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(
    argv: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", "show", *argv]) == 2
    assert cause in capsys.readouterr().err
