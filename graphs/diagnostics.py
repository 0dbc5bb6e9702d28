"""The mistakes of a graph, each with its position in a file, and the refusal of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

Path = tuple[str | int, ...]  # ("operators", "split", "min_uncached_tokens") or ("edges", 2)
VALUE = "value"  # a path names a key; (*path, VALUE) names the key's value
_MAX_CAUSE_CHARS = 500  # a cause may quote a value of config.json of any length


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a text: 1-based line and column."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake: its path in the graph, a message, a `hint` how to fix it, and its position."""

    code: str  # kebab-case, stable: "unknown-op"
    path: Path
    message: str
    hint: str | None = None
    position: Position | None = None

    def __str__(self) -> str:
        where = str(self.position) if self.position else ".".join(map(str, self.path))
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}: {self.message}{hint}" if where else f"{self.message}{hint}"


class GraphError(ValueError):
    """A graph cannot run. `diagnostics`: every mistake that was found."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        self.diagnostics = diagnostics
        super().__init__("\n".join(map(str, diagnostics)))


def locate(
    diagnostics: Iterable[Diagnostic], positions: Mapping[Path, Position]
) -> tuple[Diagnostic, ...]:
    """Add positions to the diagnostics that have none, and sort them by position."""
    placed = [
        found if found.position else replace(found, position=position_of(found.path, positions))
        for found in diagnostics
    ]
    return tuple(sorted(placed, key=_order))


def position_of(path: Path, positions: Mapping[Path, Position]) -> Position | None:
    """The position of `path`, or else of the nearest enclosing path that has one.

    Returns None for a path that begins with a command-line option (`--option`).
    """
    if path and str(path[0]).startswith("--"):
        return None
    for length in range(len(path), -1, -1):
        if path[:length] in positions:
            return positions[path[:length]]
    return None


def _order(found: Diagnostic) -> tuple[int, int]:
    at = found.position
    return (at.line, at.column) if at else (0, 0)


def truncated(text: str, longest: int = 44) -> str:
    """`text`, cut to at most `longest` characters."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


class UnsupportedModel(ValueError):
    """A model configuration that sagellm would compute wrongly: cause, config field, and a fix."""

    def __init__(self, cause: str, *, field: str, fix: str, file: str = "config.json") -> None:
        is_long = len(cause) > _MAX_CAUSE_CHARS
        self.cause = f"{cause[:_MAX_CAUSE_CHARS]}..." if is_long else cause
        self.field = field
        self.fix = fix
        self.file = file
        super().__init__(f"{file}, {field}: {self.cause}; {fix}")

    def in_file(self, file: str) -> "UnsupportedModel":
        """The same refusal for the config.json at the path `file`."""
        return UnsupportedModel(self.cause, field=self.field, fix=self.fix, file=file)
