"""Output of commands on the terminal: progress bars of a start and of a file, and summaries."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from sagellm.backends.interface import Compiling, Loading, Progress, ProgressEvent, silent
from sagellm.batch import LineCounts
from sagellm.logs import WRITERS, is_terminal
from sagellm.statistics import Statistics

SHORT_BYTES = 64 << 20  # smaller models load too fast for a bar to be read


@contextmanager
def show_start_progress() -> Iterator[Progress]:
    """Yield a callable that shows kernel compilation and weight loading on stderr.

    It shows nothing if stderr is no terminal.
    """
    if not is_terminal():
        yield silent
        return
    start = _StartProgress(Console(file=sys.stderr, highlight=False, soft_wrap=True))
    try:
        yield start
    finally:
        start.close()


class _StartProgress:
    """Shows a bar for each model while the model loads. Thread-safe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._is_closed = False

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            if self._is_closed:  # a loading thread may outlive the start
                return
            if isinstance(event, Compiling):
                self._console.print(_compiling(event), markup=False)
            elif event.num_bytes >= event.total_bytes:
                self._end(event.model)
            elif event.total_bytes >= SHORT_BYTES:
                self._advance(event)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._stop()

    def _advance(self, event: Loading) -> None:
        bar = self._bar or self._begin()
        if event.model not in self._tasks:
            self._tasks[event.model] = bar.add_task(
                f"loading {event.model}", total=event.total_bytes
            )
        bar.update(self._tasks[event.model], completed=event.num_bytes)

    def _begin(self) -> Bar:
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        for writer in WRITERS:
            writer.takes_line = True  # log lines must clear the bar's line first
        return self._bar

    def _end(self, model: str) -> None:
        task = self._tasks.pop(model, None)
        if self._bar is not None and task is not None:
            self._bar.remove_task(task)
            if not self._tasks:
                self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for writer in WRITERS:
            writer.takes_line = False


def _compiling(event: Compiling) -> str:
    compiler = Path(event.compiler.split(maxsplit=1)[0]).name
    return (
        f"compiling C kernels with {compiler}: the first start on this machine with this version; "
        f"they are kept in {event.folder}"
    )


def show_summary(statistics: Statistics, counts: LineCounts | None = None) -> None:
    """Print the figures of a run to stderr: as a table on a terminal, else as plain lines."""
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    rows = summary_rows(statistics, counts)
    if not console.is_terminal:
        for label, value in rows:
            console.print(f"{label}: {value}", markup=False)
        return
    table = Table(*(label for label, _ in rows))
    table.add_row(*(value for _, value in rows))
    console.print(table)


def print_summary(statistics: Statistics, counts: LineCounts) -> None:
    """Print the figures of a run to stdout as one JSON object.

    Times are in seconds; null stands for a time that was not measured.
    """
    figures = {
        "answered": counts.num_answered,
        "failed": counts.num_failed,
        "skipped": counts.num_skipped,
        "ended": dict(statistics.ended),
        "tokens": statistics.num_tokens,
        "elapsed_s": statistics.elapsed_s,
        "tokens_per_s": statistics.tokens_per_s,
        "ttft_s": {"p50": statistics.ttft_p50_s, "p99": statistics.ttft_p99_s},
        "itl_s": {"p50": statistics.itl_p50_s, "p99": statistics.itl_p99_s},
        "peak_kv_ratio": statistics.peak_kv_ratio,
        "preemptions": statistics.num_preemptions,
    }
    print(msgspec.json.encode(figures).decode())


def summary_rows(statistics: Statistics, counts: LineCounts | None = None) -> list[tuple[str, str]]:
    """Label and value of each figure. `counts` None means that the run was a single request."""
    return [
        ("requests", _requests(counts) if counts else "1"),
        ("tokens", str(statistics.num_tokens)),
        ("tokens/s", f"{statistics.tokens_per_s:.1f}"),
        ("TTFT p50/p99", _pair(statistics.ttft_p50_s, statistics.ttft_p99_s)),
        ("ITL p50/p99", _pair(statistics.itl_p50_s, statistics.itl_p99_s)),
        ("peak KV use", f"{statistics.peak_kv_ratio:.1%}"),
    ]


def _requests(counts: LineCounts) -> str:
    apart = (("failed", counts.num_failed), ("answered before", counts.num_skipped))
    extra = ", ".join(f"{num} {what}" for what, num in apart if num)
    return f"{counts.num_answered + counts.num_failed}" + (f" ({extra})" if extra else "")


def _pair(p50_s: float | None, p99_s: float | None) -> str:
    if p50_s is None or p99_s is None:
        return "-"
    return f"{p50_s * 1e3:.1f} / {p99_s * 1e3:.1f} ms"


class FileProgress:
    """A context that shows a bar of processed lines on stderr, and each failed line.

    The length of the bar is the number of lines of `input`, which a pipe does not tell.
    """

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
        """Count one input line. `line`: its output line, or None if it was skipped."""
        self._bar.advance(self._task)
        if line and "error" in line:
            console = self._console
            console.print(f"{line['id']}: {line['error']['message']}", markup=False, style="red")

    def __enter__(self) -> "FileProgress":
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
    """The number of lines of a file that are not blank; None for a pipe."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
