"""The meaning of GRAPH in every command: a shipped name, a file or a model."""

import shutil
from pathlib import Path

import pytest

from sagellm.builder import Graph
from sagellm.cli import main
from sagellm.cli.doctor import CHECKS
from sagellm.cli.errors import Failure
from sagellm.cli.graph_argument import choose_graph, find_graph_file
from sagellm.opening.sources import graph_file, shipped_names
from sagellm.runtime.models.folder import BUILT_IN

OWN = """\
sagellm: 1
name: of_the_user
engines: {g: {model: sage-tiny, device: cpu}}
operators: {generate: {op: generate, engine: g}}
edges: [source -> generate -> sink]
"""
COMMANDS = {
    "run": ("run", "--prompt", "What is 20 + 31?", "--chat", "--max-tokens", "4"),
    "serve": ("serve", "--print-config"),
    "check": ("graph", "check"),
    "show": ("graph", "show"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; it is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(here: Path) -> Path:
    """A model folder in the current folder."""
    return Path(shutil.copytree(BUILT_IN["sage-tiny"], here / "mine"))


def called(command: str, name: str, *options: str) -> int:
    """The exit code of one of COMMANDS with `name` as its graph."""
    words = COMMANDS[command]
    verbs = [word for word in words[:2] if not word.startswith("-")]
    return main([*verbs, name, *words[len(verbs) :], *options])


def test_a_model_gets_the_default_graph() -> None:
    graph, model = choose_graph("sage-tiny", None)
    assert (graph.name, model) == ("joint", "sage-tiny")


@pytest.mark.parametrize("name", ["pd", "graphs/pd.yaml"])
def test_a_graph_keeps_its_models(name: str) -> None:
    graph, model = choose_graph(name, None)
    assert (graph.name, model) == ("pd", None)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["sage-tiny", "mine", "./mine"])
def test_every_command_takes_a_model(
    command: str, name: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(command, name) == 0
    assert capsys.readouterr().out


def test_run_answers_as_the_graph_with_that_model_does(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called("run", "mine")
    answer = capsys.readouterr().out
    called("run", "joint", "--model", "mine")
    assert capsys.readouterr().out == answer != ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "cause", "fix"),
    [
        ("sage-tny", "there is no graph and no model of that name", "did you mean sage-tiny?"),
        ("pdd", "there is no graph and no model of that name", "did you mean pd?"),
        ("nothing-like-it", "there is no graph and no model", "graphs: embed, joint, map, pd"),
        ("far-off.yaml", "no such graph", "give a file, or one of embed"),
        ("pd.yaml", "no such graph", "did you mean pd?"),
        ("./pd.yaml", "no such graph", "did you mean pd?"),
        ("x/pd.yaml", "no such graph", "did you mean pd?"),
        ("./pd", "model ./pd: there is no such folder", "check the path"),
    ],
)
def test_a_name_of_nothing_says_what_there_is(
    command: str, name: str, cause: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (command, name) == ("serve", "./pd"):
        pytest.skip("--print-config opens no model")
    assert called(command, name) == 2
    said = capsys.readouterr().err
    assert cause in said
    assert fix in said
    assert said.count("error:") == 1


@pytest.mark.parametrize("command", ["run", "serve", "check"])
def test_a_model_excludes_another_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(command, "sage-tiny", "--model", "sage-tiny") == 2
    assert "sage-tiny is no graph" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.gguf", "model.safetensors", "config.json"])
def test_a_file_of_a_model_is_no_graph(
    file: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / file).write_bytes(b"GGUF")
    assert called("run", file) == 2
    assert f"model {file}: it is a" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("other", ["joint", "joint.yaml", "joint.yml"])
def test_a_shipped_graph_is_never_shadowed_and_the_file_is_said(
    command: str, other: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / other).write_text(OWN)
    assert called(command, "joint") == 0
    shown = capsys.readouterr()
    assert "of_the_user" not in shown.out
    (line,) = [line for line in shown.err.splitlines() if "warning:" in line]
    assert "joint means the shipped graph" in line
    assert f"write ./{other} for" in line


def test_aggregated_is_another_name_of_the_graph_joint(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graph_file("aggregated") == graph_file("joint") == graph_file("graphs/aggregated.yaml")
    assert main(["graph", "check", "aggregated"]) == 0
    assert Graph.load("aggregated").name == "joint"
    (here / "aggregated.yaml").write_text(OWN)
    assert main(["graph", "check", "aggregated"]) == 0
    assert "write ./aggregated.yaml for" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["./joint.yaml", "joint.yaml", "graphs/joint.yaml"])
def test_a_path_means_that_file(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "graphs").mkdir()
    (here / name).write_text(OWN)
    assert main(["graph", "check", name]) == 0
    shown = capsys.readouterr()
    assert "graph of_the_user" in shown.out
    assert shown.err == ""


def test_an_absolute_path_means_that_file(here: Path) -> None:
    assert graph_file(str(here / "pd.yaml")) == here / "pd.yaml"
    with pytest.raises(Failure, match="no such graph"):
        choose_graph(str(here / "pd.yaml"), None)


def test_the_path_of_the_documents_means_the_shipped_graph_where_no_such_folder_is(
    here: Path,
) -> None:
    assert graph_file("graphs/pd.yaml") == graph_file("pd")
    (here / "graphs").mkdir()
    with pytest.raises(Failure, match="no such graph"):
        choose_graph("graphs/pd.yaml", None)


def test_a_path_object_is_a_path(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such graph"):
        Graph.load(Path("pd"))
    (here / "pd").write_text(OWN)
    assert Graph.load(Path("pd")).name == "of_the_user"
    assert Graph.load("pd").name == "pd"


def test_a_shipped_file_itself_is_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(graph_file("pd").parent)
    assert main(["graph", "check", "pd"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("run", ("sage-tiny",)),
        ("run", ("joint", "--model", "sage-tiny")),
        ("serve", ("sage-tiny",)),
        ("check", ("joint", "--model", "sage-tiny")),
        ("show", ("sage-tiny",)),
    ],
)
def test_a_shipped_model_is_never_shadowed_and_the_folder_is_said(
    command: str, arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "sage-tiny").mkdir()
    assert called(command, *arguments) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert "sage-tiny means the shipped model" in line
    assert "write ./sage-tiny for" in line


def test_a_folder_of_the_name_of_a_hub_id_wins(here: Path, model: Path) -> None:
    (here / "owner").mkdir()
    model.rename(here / "owner" / "name")
    assert find_graph_file("owner/name") is None
    assert main(["graph", "check", "owner/name"]) == 0


def test_names_are_told_apart(here: Path) -> None:
    assert [find_graph_file(name) for name in ("sage-tiny", "null", str(here), "owner/name")] == [
        None
    ] * 4
    assert all(find_graph_file(name) for name in (*shipped_names(), "graphs/pd.yaml"))


def test_doctor_reads_the_packaged_graphs_and_runs_no_code(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(*_: object) -> None:
        raise AssertionError("code was imported")

    (here / "map").write_text("sagellm: 1\nname: [")
    monkeypatch.setattr("sagellm.builder.import_all", imported)
    finding = CHECKS["graphs"]()
    assert (finding.status, finding.detail) == ("ok", ", ".join(shipped_names()))
