"""The progress of a file: a bar on a terminal, a line for each failed request anywhere."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shown on stderr while inside; `input` is counted for the bar's end where it can be."""

    def __init__(self, input: Path | None) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        total = _num_lines(input) if self._console.is_terminal else None
        self._task = self._bar.add_task("requests", total=total)

    def advance(self, line: dict[str, Any] | None) -> None:
        """One line is done; `line` is what was written for it, None if it was skipped."""
        self._bar.advance(self._task)
        if line and "error" in line:
            console = self._console
            console.print(f"{line['id']}: {line['error']['message']}", markup=False, style="red")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def _num_lines(path: Path | None) -> int | None:
    """Lines of a file that are not blank; None for a pipe."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
