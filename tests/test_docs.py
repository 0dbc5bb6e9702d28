"""What README and docs/ show works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

from sagellm import Graph
from sagellm.builder import RESOLVER
from sagellm.checking import check_graph
from sagellm.cli import main
from sagellm.graphs.text.yaml import load

ROOT = Path(__file__).resolve().parent.parent
README, GRAPHS, STRUCTURE = (
    (ROOT / name).read_text() for name in ("README.md", "docs/graphs.md", "docs/structure.md")
)
FLOORS = ("graphs", "backends", "runtime", "operators", "sagellm")


def block(text: str, first_words: str) -> str:
    """The indented block that begins with these words, without its indent."""
    start = text.index(f"    {first_words}")
    lines = text[start:].splitlines()
    end = next(at for at, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end])


def test_the_yaml_in_the_docs_is_right() -> None:
    graph = check_graph(load(block(GRAPHS, "sagellm: 1"), file="docs"), RESOLVER)
    assert graph.name == "pd"


def test_the_dsl_in_the_docs_is_right() -> None:
    names: dict[str, Any] = {}
    exec(block(GRAPHS, "from sagellm import Graph, ops"), names)
    graph: Graph = names["graph"]
    assert check_graph(graph.document, RESOLVER).name == "pd"


def test_the_program_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block(README, "import trio"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", re.findall(r"    sagellm (graph .+|doctor)", README))
def test_the_commands_in_the_readme_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split("#")[0].split()) == 0


def test_options_in_the_docs_are_those_there_are() -> None:
    rows = re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \|", GRAPHS.split("## Operators")[1], re.M)
    for ops, options in rows:
        for op in re.findall(r"`(\w+)`", ops):
            known = RESOLVER.operator(op).spec.option_types
            named = re.findall(r"`(\w+)`", re.sub(r": .*?(?=\(|$)", "", options))
            assert set(named) <= set(known), op


def test_every_folder_is_in_the_structure() -> None:
    """`rglob` does not follow the links in sagellm/."""
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    folders = {path.parent.relative_to(ROOT).as_posix() for path in files}
    missing = {folder for folder in folders if f"`{folder}/`" not in STRUCTURE}
    assert missing <= {"backends/cpu/native"}


def test_every_file_named_in_the_structure_is_there() -> None:
    named = re.findall(r"`([\w/]+/\w+\.py)`", STRUCTURE)
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
