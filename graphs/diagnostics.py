"""Errors of a graph, each with its place in a file, and the refusal of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

Path = tuple[str | int, ...]  # ("operators", "split", "min_uncached_tokens") or ("edges", 2)
VALUE = "value"  # (*path, VALUE) is where the value of a key stands; path itself is the key


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
    """One mistake: where (path, and position once known), what, and how to fix it."""

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
    """A graph that cannot be run: carries every diagnostic found."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        self.diagnostics = diagnostics
        super().__init__("\n".join(map(str, diagnostics)))


def locate(
    diagnostics: Iterable[Diagnostic], positions: Mapping[Path, Position]
) -> tuple[Diagnostic, ...]:
    """The diagnostics with positions, in the order of the text; one that has its own keeps it."""
    placed = [
        found if found.position else replace(found, position=position_of(found.path, positions))
        for found in diagnostics
    ]
    return tuple(sorted(placed, key=_line_and_column))


def position_of(path: Path, positions: Mapping[Path, Position]) -> Position | None:
    """Where `path` stands, or what encloses it. An option of a command has no place."""
    if path and str(path[0]).startswith("--"):
        return None
    for length in range(len(path), -1, -1):
        if path[:length] in positions:
            return positions[path[:length]]
    return None


def _line_and_column(found: Diagnostic) -> tuple[int, int]:
    at = found.position
    return (at.line, at.column) if at else (0, 0)


def truncated(text: str, longest: int = 44) -> str:
    """The text, its end cut off where it is long."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


_MAX_CHARS = 500  # a value of a config.json has any length


class UnsupportedModel(ValueError):
    """A model configuration that is not built; says the cause, the config field, and a way out."""

    def __init__(self, cause: str, *, field: str, fix: str, file: str = "config.json") -> None:
        self.cause = cause if len(cause) <= _MAX_CHARS else f"{cause[:_MAX_CHARS]}..."
        self.field = field
        self.fix = fix
        self.file = file
        super().__init__(f"{file}, {field}: {self.cause}; {fix}")

    def in_file(self, file: str) -> "UnsupportedModel":
        """The same refusal, with the path of the config.json that it is about."""
        return UnsupportedModel(self.cause, field=self.field, fix=self.fix, file=file)
