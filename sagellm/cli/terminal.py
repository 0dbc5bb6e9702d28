"""What commands show on the terminal: progress bars, answers and their figures."""

import sys
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import trio
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
from sagellm.cli.errors import drain_on_interrupt
from sagellm.client.replies import AsyncReplyStream, Piece, Usage
from sagellm.logs import WRITERS, is_terminal
from sagellm.statistics import Statistics

SHORT_BYTES = 64 << 20  # are read before anybody looks


@contextmanager
def show_start_progress() -> Iterator[Progress]:
    """What a start is to report to: shown on stderr where that is a terminal, and nothing else."""
    if not is_terminal():
        yield silent
        return
    start = _StartProgress(Console(file=sys.stderr, highlight=False, soft_wrap=True))
    try:
        yield start
    finally:
        start.close()


class _StartProgress:
    """One bar for each model that loads; it goes when all of it is there. Thread-safe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._is_closed = False

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            if self._is_closed:
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
            writer.takes_line = True
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
    """A table on stderr; plain lines where that is not a terminal."""
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
    """The same as one JSON object on stdout; seconds, and None for what was not measured."""
    said = {
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
    print(msgspec.json.encode(said).decode())


def summary_rows(statistics: Statistics, counts: LineCounts | None = None) -> list[tuple[str, str]]:
    """Label and value of each figure; without a tally it was one request."""
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
    """Lines of a file that are not blank; None for a pipe."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


@dataclass(slots=True)
class StreamedAnswer:
    """An answer, as far as it came. Times in seconds."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    num_pieces: int = 0  # with text
    ttft_s: float | None = None
    last_s: float | None = None  # of its last token
    is_stopped: bool = False

    @property
    def num_tokens(self) -> int:
        """As the server counted, or else one a piece."""
        counted = self.usage.completion_tokens if self.usage else None
        return self.num_pieces if counted is None else counted

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first."""
        if self.ttft_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """From the call to the last token."""
        return self.num_tokens / self.last_s if self.last_s else None

    def take(self, piece: Piece, after_s: float) -> None:
        if piece or piece.finish_reason is not None:  # an EOS has no text
            self.ttft_s = after_s if self.ttft_s is None else self.ttft_s
            self.last_s = after_s
        self.num_pieces += bool(piece)
        self.text += piece
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage


async def print_stream(
    asking: Awaitable[AsyncReplyStream], *, silent: bool = False
) -> StreamedAnswer:
    """Print the answer while it comes. Ctrl-C cancels it; what came is kept.

    Raises ClientError.
    """
    told, started_s = StreamedAnswer(), trio.current_time()
    with trio.CancelScope() as scope:
        async with drain_on_interrupt(scope, "\nstopped"), await asking as stream:
            async for piece in stream:
                told.take(piece, trio.current_time() - started_s)
                if not silent:
                    print(piece, end="", flush=True)
    told.is_stopped = scope.cancelled_caught
    if not silent:
        print(flush=True)
    return told


def show_stats(told: StreamedAnswer) -> None:
    """One line on stderr: tokens, TTFT, time a token, tokens a second."""
    parts = [f"{told.num_tokens} tokens"]
    if told.usage is not None and told.usage.prompt_tokens is not None:
        parts.insert(0, f"prompt {told.usage.prompt_tokens} tokens")
    if told.ttft_s is not None:
        parts.append(f"TTFT {told.ttft_s * 1e3:.1f} ms")
    if told.tpot_s is not None:
        parts.append(f"TPOT {told.tpot_s * 1e3:.1f} ms")
    if told.tokens_per_s is not None:
        parts.append(f"{told.tokens_per_s:.1f} tokens/s")
    print(", ".join(parts), file=sys.stderr)


def print_answer(told: StreamedAnswer, model: str) -> None:
    """The answer and its figures as one object."""
    timing = {name: getattr(told, name) for name in ("ttft_s", "tpot_s", "tokens_per_s")}
    said: dict[str, Any] = {
        "model": model,
        "text": told.text,
        "finish_reason": told.finish_reason,
        "usage": told.usage,
        "timing": timing,
    }
    print(msgspec.json.encode(said).decode())
