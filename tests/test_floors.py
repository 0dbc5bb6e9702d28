"""The floors hold: no import upwards, no circle, and no torch where a graph is only described."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"graphs": 0, "backends": 1, "runtime": 2, "operators": 3, "sagellm": 4}
TORCHLESS = ("graphs", "operators")
METHOD = (ast.FunctionDef, ast.AsyncFunctionDef)
MAY_IMPORT_LATE = ("backends",)  # kernels of a device are imported where it is there


@dataclass(frozen=True)
class Import:
    """One imported module, with its line and whether it stands inside a function."""

    module: str
    line: int
    is_late: bool


def sources(floor: str) -> Iterator[Path]:
    """The Python files of a floor; those behind the four links belong to their own."""
    for path in sorted((ROOT / floor).rglob("*.py")):
        inside = path.relative_to(ROOT).parts
        if not (floor == "sagellm" and inside[1] in FLOORS):
            yield path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "sagellm" else ("sagellm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for floor in FLOORS for path in sources(floor)}


def imports(tree: ast.AST, is_late: bool = False) -> Iterator[Import]:
    """Every import below a node, `TYPE_CHECKING` blocks included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, is_late)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield Import(whole if whole in MODULES else str(node.module), node.lineno, is_late)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, is_late or is_function)


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Parsed when a test asks: each worker collects this file, one runs it."""
    return tuple(imports(ast.parse(MODULES[module].read_text())))


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "sagellm"


def edges(module: str) -> set[str]:
    """The modules of ours that a module imports itself."""
    return {found.module for found in imports_of(module)} & set(MODULES)


def reachable(module: str) -> set[str]:
    """All modules of ours that importing a module loads, packages on the way included."""
    level = [module]
    for name in level:
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        level += sorted((edges(name) | parents & set(MODULES)) - set(level))
    return set(level)


FOLDERS = {path.relative_to(ROOT).parent for path in MODULES.values()}


def test_every_floor_is_read() -> None:
    assert {floor_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_lead_downwards(floor: str) -> None:
    upwards = [
        f"{MODULES[module]}:{found.line}: {found.module}"
        for module in MODULES
        if floor_of(module) == floor
        for found in imports_of(module)
        if found.module.startswith("sagellm") and FLOORS[floor_of(found.module)] > FLOORS[floor]
    ]
    assert upwards == []


def test_there_is_no_circle() -> None:
    left = {module: edges(module) - {module} for module in MODULES}
    while leaves := {module for module, needs in left.items() if not needs & set(left)}:
        left = {module: needs for module, needs in left.items() if module not in leaves}
    assert left == {}


def room_of(module: str) -> str:
    """A folder that has no folders inside; a module of its own beside such folders."""
    folder = MODULES[module].relative_to(ROOT).parent
    has_folders = any(folder in other.parents for other in FOLDERS)
    return module if has_folders else str(folder)


def test_no_folder_is_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for module in MODULES:
        rooms = {room_of(name) for name in edges(module)} - {room_of(module)}
        needs[room_of(module)] = needs.get(room_of(module), set()) | rooms
    while leaves := {room for room, others in needs.items() if not others & set(needs)}:
        needs = {room: others for room, others in needs.items() if room not in leaves}
    assert needs == {}


@pytest.mark.parametrize("folder", ["runtime/core", "runtime/executors"])
def test_what_runs_a_graph_reads_in_small_pieces(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        classes = (one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.ClassDef))
        for one in classes:
            methods = [part for part in one.body if isinstance(part, METHOD)]
            assert len(methods) <= 15, f"{path}: {one.name}"


@pytest.mark.parametrize("floor", TORCHLESS)
def test_torch_is_out_of_reach(floor: str) -> None:
    with_torch = {
        module: name
        for module in MODULES
        if floor_of(module) == floor
        for name in reachable(module)
        if any(found.module.split(".")[0] == "torch" for found in imports_of(name))
    }
    assert with_torch == {}


def test_imports_stand_at_the_top() -> None:
    late = [
        f"{MODULES[module]}:{found.line}: {found.module}"
        for module in MODULES
        if floor_of(module) not in MAY_IMPORT_LATE
        for found in imports_of(module)
        if found.is_late
    ]
    assert late == []


@pytest.mark.parametrize("floor", sorted(set(FLOORS) - {"sagellm"}))
def test_a_link_leads_to_each_floor(floor: str) -> None:
    link = ROOT / "sagellm" / floor
    assert link.is_symlink()
    assert link.readlink() == Path("..") / floor


def test_an_upward_import_would_be_seen() -> None:
    guarded = "if TYPE_CHECKING:\n    from sagellm.runtime import messages\n"
    (found,) = imports(ast.parse(guarded))
    assert FLOORS[floor_of(found.module)] > FLOORS["graphs"]


def test_a_late_import_would_be_seen() -> None:
    (found,) = imports(ast.parse("def run():\n    import torch\n"))
    assert found.is_late


def test_loggers_obey_logging_alone() -> None:
    """structlog's own loggers print to stdout in a program that never configured it."""
    others = [module for module, path in MODULES.items() if ".get_logger(" in path.read_text()]
    assert others == []
