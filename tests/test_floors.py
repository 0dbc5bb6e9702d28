"""The floors hold: no import upwards, no circle, and no torch where a graph is only described."""

import ast
from pathlib import Path

import pytest
from house import (
    FLOORS,
    FUNCTION,
    MODULES,
    ROOT,
    comment_share,
    edges,
    file_lines,
    floor_of,
    function_lines,
    has_code,
    imports,
    imports_of,
    in_circles,
    package_circles,
    repeated_files,
    repeated_types,
)

# Type names that several modules define, and why.
REPEATED_TYPES = {
    "Graph": "the frozen value of floor 0; its builder, which users import as sagellm.Graph",
    "P": "a type variable",
    "R": "a type variable",
    "S": "a type variable",
    "T": "a type variable",
}
# File names that several folders have: the folder gives the name its meaning.
REPEATED_FILES = {
    "__main__.py": "what `python -m` runs: sagellm itself; the gateway as SAGE starts it",
    "chat.py": "chat templates of a model; the command `sagellm chat`",
    "errors.py": "the errors of callers in Python; those of commands, with exit codes",
    "keys.py": "CURVE keys of links; API keys of a command line",
    "plan.py": "which operators of a graph run together; the command `sagellm plan`",
    "lifecycle.py": "of a worker; of a gateway",
    "worker_main.py": "how any worker process begins; what that of an engine runs",
}
MOST_FILES = 473  # with more than the docstring of a folder
MOST_LINES = 360
TORCHLESS = ("graphs", "operators")
MAY_IMPORT_LATE = ("backends",)  # kernels of a device are imported where it is there


def reachable(module: str) -> set[str]:
    """All modules of ours that importing a module loads, packages on the way included."""
    level = [module]
    for name in level:
        parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
        level += sorted((edges(name) | parents & set(MODULES)) - set(level))
    return set(level)


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
    assert in_circles({module: edges(module) - {module} for module in MODULES}) == {}


def test_no_folder_is_in_a_circle() -> None:
    assert package_circles() == {}


@pytest.mark.parametrize("folder", ["runtime/core", "runtime/executors"])
def test_what_runs_a_graph_reads_in_small_pieces(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        classes = (one for one in ast.walk(ast.parse(text)) if isinstance(one, ast.ClassDef))
        for one in classes:
            methods = [part for part in one.body if isinstance(part, FUNCTION)]
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


def test_a_type_name_has_one_home() -> None:
    assert repeated_types().keys() <= REPEATED_TYPES.keys()


def test_a_file_name_is_repeated_only_where_its_folder_gives_it_a_meaning() -> None:
    assert repeated_files().keys() <= REPEATED_FILES.keys()


def test_files_are_few_and_none_is_long() -> None:
    assert sum(has_code(module) for module in MODULES) <= MOST_FILES
    assert {path: lines for path, lines in file_lines().items() if lines > MOST_LINES} == {}


def test_functions_are_short() -> None:
    lines = sorted(function_lines())
    assert lines[len(lines) // 2] <= 5
    assert lines[len(lines) * 9 // 10] <= 13
    assert lines[-1] <= 50


def test_reasons_stand_in_comments() -> None:
    assert comment_share() >= 3
