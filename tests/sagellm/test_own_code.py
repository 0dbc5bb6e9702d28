"""A user's own code: imported only on request; errors have the line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sagellm.map_functions  # its functions outlive the tests, as the module does
from sagellm import Graph, Sampling
from sagellm.backends.interface import silent
from sagellm.cli import main
from sagellm.extensions import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.codec import from_json, from_msgpack, to_json, to_msgpack
from sagellm.graphs.text.yaml import Document, dump, load
from sagellm.opening.checking import check_graph
from sagellm.opening.open_graph import OpenGraph
from sagellm.opening.sources import shipped_names
from sagellm.opening.worker_main import open_engine
from sagellm.operators.policies import POLICIES
from sagellm.operators.routing import STRATEGIES
from sagellm.runtime.registry import FUNCTIONS

GRAPH = """\
sagellm: 1
name: own
imports: [{imports}]
engines:
  g: {{model: "null", device: "null"}}
operators:
  before: {{op: map, function: {function}}}
  generate: {{op: generate, engine: g}}
edges:
  - source -> before -> generate -> sink
"""
CODE = """\
import sagellm
from beside import SUFFIX

@sagellm.function
def add_a_word(request):
    return request.prompt + SUFFIX
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove everything that a test registers and imports."""
    tables = (FUNCTIONS, POLICIES, STRATEGIES, RESOLVER._operators)
    for table in tables:
        monkeypatch.setattr(table, "_registered", dict(table._registered))
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(modules):
        if name.startswith(("sagellm_import_", "beside", "my_")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a user's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("SUFFIX = ' word'\n")
    (tmp_path / "my_code.py").write_text(CODE)
    return tmp_path


def write(folder: Path, imports: str = "", function: str = "add_a_word") -> str:
    path = folder / "own.yaml"
    path.write_text(GRAPH.format(imports=imports, function=function))
    return str(path)


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(command) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["my_code", "my_code.py"])
def test_import_makes_a_function_known(folder: Path, name: str) -> None:
    graph = write(folder)
    assert main(["graph", "check", graph, "--import", name]) == 0
    assert main(["graph", "show", graph, "--import", name]) == 0
    said = ["run", graph, "--prompt", "a", "--max-tokens", "2", "--import", name, "--json"]
    assert main(said) == 0


def test_without_it_the_hint_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = failed(capsys, "graph", "check", write(folder))
    assert "no function is registered as `add_a_word`" in shown
    assert "--import" in shown


def test_the_key_imports_is_relative_to_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = write(folder, "my_code.py")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["graph", "check", graph]) == 0
    with Graph.load(graph).open() as session:
        assert session.generate("a", sampling=Sampling(max_tokens=1)).finish_reason == "length"


def test_a_file_is_imported_once(folder: Path) -> None:
    (folder / "my_code.py").write_text("import sagellm\nsagellm.register_function(len, 'size')\n")
    write(folder, "my_code.py, ./my_code.py", "size")
    assert main(["graph", "check", "own.yaml", "--import", "my_code.py"]) == 0


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("my_cod", "there is no module `my_cod`"),
        ("my.code", "there is no module `my`"),
        ("my_cod.py", "there is no file"),
        ("./own.yaml", "is no .py file"),
    ],
)
def test_what_is_missing_is_told_with_its_place(
    folder: Path, capsys: pytest.CaptureFixture[str], imports: str, message: str
) -> None:
    graph = write(folder, imports)
    shown = failed(capsys, "graph", "check", graph)
    assert message in shown
    assert f"{graph}:3:11" in shown
    (folder / "own.yaml").write_text(GRAPH.format(imports="", function="add_a_word"))
    assert f"--import {imports}" in failed(
        capsys, "run", graph, "--prompt", "a", "--import", imports
    )


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sagellm\n\nx = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import sagellm\n\nimport nowhere\n", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import sagellm\n\ndef f(:\n", "SyntaxError: invalid syntax"),
        ("import sys\n\nsys.exit(5)\n", "SystemExit: 5"),
        ("import sagellm\n\nsagellm.register_function(3)\n", "TypeError: "),
    ],
)
@pytest.mark.parametrize("name", ["my_broken", "my_broken.py"])
def test_an_error_while_importing_has_type_text_and_line(
    folder: Path, capsys: pytest.CaptureFixture[str], code: str, told: str, name: str
) -> None:
    (folder / "my_broken.py").write_text(code)
    shown = failed(capsys, "graph", "check", write(folder, name))
    assert told in shown
    assert f"{folder}/my_broken.py:3)" in shown


@pytest.mark.parametrize("imports", ["3", "''", "{a: b}"])
def test_an_import_is_a_text(folder: Path, imports: str) -> None:
    with pytest.raises(GraphError) as raised:
        Graph.load(write(folder, imports))
    assert raised.value.diagnostics[0].code == "bad-form"


def test_imports_round_trip() -> None:
    graph = load(GRAPH.format(imports="a.b, ./c d.py", function="f"), file="own").graph
    assert graph.attrs["imports"] == ("a.b", "./c d.py")
    assert load(dump(graph), file="again").graph == graph
    assert from_json(to_json(graph)) == from_msgpack(to_msgpack(graph)) == graph


async def test_a_graph_that_came_over_a_wire_imports_nothing(folder: Path) -> None:
    """Checks, openings, workers and gateways import nothing."""
    (folder / "my_trap.py").write_text("raise SystemExit('imported')\n")
    text = GRAPH.format(imports="my_trap.py, my_trap", function="add_a_word")
    graph = from_msgpack(to_msgpack(load(text, file="f").graph))
    await open_engine(graph, "g", 0, None, silent)
    known = {"add_a_word": lambda request: request.prompt}
    check_graph(Document(graph, {}), RESOLVER, known)
    opening = OpenGraph(
        Document(graph, {}), resolver=RESOLVER, functions=known, overrides={}, model=None, seed=0
    )
    async with opening as session:
        await session.generate("a", sampling=Sampling(max_tokens=1))
    assert not any("my_trap" in name for name in sys.modules)


@pytest.mark.parametrize("name", shipped_names())
def test_check_and_open_agree_on_shipped_graphs(name: str) -> None:
    assert main(["graph", "check", name]) == 0
    graph = Graph.load(name)
    check_graph(graph.document, RESOLVER, FUNCTIONS)


def test_the_functions_of_map_run_as_it_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "map", "--chat", "--prompt", "What is 20 + 31?"]) == 0
    assert capsys.readouterr().out == "51\n"
    assert sagellm.map_functions.rewrite_prompt in FUNCTIONS.values()
