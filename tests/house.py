"""Figures of the source tree: `make house` prints them, and tests bound some of them.

A floor is a top-level package. A room is a folder without subfolders, or a module of a folder that
has subfolders.
"""

import ast
import functools
import io
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"graphs": 0, "backends": 1, "runtime": 2, "operators": 3, "sagellm": 4}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
SMALL_FILE_LINES = 40
LONG_FILE_LINES = 300


@dataclass(frozen=True)
class Import:
    """One import. `is_late`: whether the import is inside a function."""

    module: str
    line: int
    is_late: bool


def sources(floor: str) -> Iterator[Path]:
    """The Python files of a floor.

    `sagellm` contains links to the other floors; files below a link belong to those floors.
    """
    for path in sorted((ROOT / floor).rglob("*.py")):
        inside = path.relative_to(ROOT).parts
        if not (floor == "sagellm" and inside[1] in FLOORS):
            yield path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "sagellm" else ("sagellm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for floor in FLOORS for path in sources(floor)}
FOLDERS = {path.relative_to(ROOT).parent for path in MODULES.values()}


@functools.cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module. Parsed on demand: few test workers need all of them."""
    return ast.parse(MODULES[module].read_text())


def imports(tree: ast.AST, is_late: bool = False) -> Iterator[Import]:
    """Every import below a node, including those in `TYPE_CHECKING` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, is_late)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield Import(whole if whole in MODULES else str(node.module), node.lineno, is_late)
        else:
            yield from imports(node, is_late or isinstance(node, FUNCTION))


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(imports(tree_of(module)))


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "sagellm"


def edges(module: str) -> set[str]:
    """The modules of sagellm that a module imports directly."""
    return {found.module for found in imports_of(module)} & set(MODULES)


def room_of(module: str) -> str:
    """The room of a module: its folder, or the module itself if the folder has subfolders."""
    folder = MODULES[module].relative_to(ROOT).parent
    has_folders = any(folder in other.parents for other in FOLDERS)
    return module if has_folders else str(folder)


def in_circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """The names of a dependency graph that are in a circle, or depend on one, and their needs."""
    while leaves := {name for name, others in needs.items() if not others & set(needs)}:
        needs = {name: others for name, others in needs.items() if name not in leaves}
    return needs


def package_circles() -> dict[str, set[str]]:
    """The rooms that import each other in a circle, or such a room, and what they import."""
    needs: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        needs[room_of(module)] |= {room_of(name) for name in edges(module)} - {room_of(module)}
    return in_circles(needs)


def public_types(module: str) -> Iterator[str]:
    """The public classes and type aliases that a module defines at its top level."""
    for node in tree_of(module).body:
        if isinstance(node, ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
            name = ast.unparse(node.target)
        elif isinstance(node, ast.Assign) and _is_new_type(node.value):
            name = ast.unparse(node.targets[0])
        else:
            continue
        if not name.startswith("_"):
            yield name


def _is_new_type(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("NewType", "TypeVar")


def repeated_types() -> dict[str, list[str]]:
    """Each public type name that several modules define, with those modules."""
    return _repeated((name, module) for module in MODULES for name in set(public_types(module)))


def repeated_files() -> dict[str, list[str]]:
    """Each file name that several folders have, with those folders."""
    files = ((path.name, str(path.relative_to(ROOT).parent)) for path in MODULES.values())
    return _repeated((name, folder) for name, folder in files if name != "__init__.py")


def _repeated(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = defaultdict(list)
    for name, place in named:
        places[name].append(place)
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def has_code(module: str) -> bool:
    """Whether a module has more than a docstring."""
    tree = tree_of(module)
    return len(tree.body) > (ast.get_docstring(tree) is not None)


def function_lines() -> list[int]:
    """The lines of code of each function, without docstring, comments and blank lines."""
    found = []
    for module, path in MODULES.items():
        coded = _lines_with_code(path)
        for node in ast.walk(tree_of(module)):
            if isinstance(node, FUNCTION):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = {line for part in body for line in range(part.lineno, _end(part) + 1)}
                found.append(len(lines & coded))
    return found


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _lines_with_code(path: Path) -> set[int]:
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {
        line
        for token in tokens
        if token.type not in nothing
        for line in range(token.start[0], token.end[0] + 1)
    }


def file_lines() -> dict[Path, int]:
    return {path: len(path.read_text().splitlines()) for path in MODULES.values()}


def comment_share() -> float:
    """The number of comments per 100 lines that are not blank."""
    num_comments = num_lines = 0
    for path in MODULES.values():
        text = path.read_text()
        num_lines += sum(1 for line in text.splitlines() if line.strip())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        num_comments += sum(token.type == tokenize.COMMENT for token in tokens)
    return 100 * num_comments / num_lines


def figures() -> Iterator[tuple[str, str]]:
    """Label and value of each figure, as printed text."""
    lines = file_lines()
    rooms = {path: count for path, count in lines.items() if path.name != "__init__.py"}
    by_floor = ", ".join(f"{floor} {len(list(sources(floor)))}" for floor in FLOORS)
    yield "product files", f"{len(lines)} ({by_floor})"
    yield "files with code", f"{sum(has_code(module) for module in MODULES)}"
    yield "lines", f"{sum(lines.values()):,}"
    yield f"files under {SMALL_FILE_LINES} lines", f"{_count(rooms, 0, SMALL_FILE_LINES - 1)}"
    yield f"files over {LONG_FILE_LINES} lines", f"{_count(rooms, LONG_FILE_LINES + 1, 10**6)}"
    yield "lines of a file", _spread(list(rooms.values()))
    yield "lines of a function", _spread(function_lines())
    yield "comments of 100 lines", f"{comment_share():.1f}"
    yield "type names with several homes", _names(repeated_types())
    yield "file names in several folders", _names(repeated_files())
    yield "packages in circles", f"{len(package_circles())}"


def _count(lines: dict[Path, int], least: int, most: int) -> int:
    return sum(least <= count <= most for count in lines.values())


def _spread(values: list[int]) -> str:
    p90 = statistics.quantiles(values, n=10)[-1]
    return f"median {statistics.median(values):.0f}, p90 {p90:.0f}, largest {max(values)}"


def _names(repeated: dict[str, list[str]]) -> str:
    listed = ", ".join(f"{name} x{len(places)}" for name, places in repeated.items())
    return f"{len(repeated)}" + (f" ({listed})" if listed else "")


if __name__ == "__main__":
    from corridor import corridor  # imported here: it loads all of sagellm, which tests do not need

    modules = corridor()
    for label, figure in (*figures(), ("modules of a streamed chat", f"{len(modules)}")):
        print(f"{label:32}{figure}")
