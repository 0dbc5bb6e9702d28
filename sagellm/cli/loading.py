"""How far a start is, for whoever waits at a terminal: kernels that compile, weights that load."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sagellm.backends.progress import Compiling, Event, Loading, Progress, silent
from sagellm.logs import WRITERS, is_terminal

SHORT_BYTES = 64 << 20  # are read before anybody looks


@contextmanager
def shown_start() -> Iterator[Progress]:
    """What a start is to report to: shown on stderr where that is a terminal, and nothing else."""
    if not is_terminal():
        yield silent
        return
    start = _Start(Console(file=sys.stderr, highlight=False, soft_wrap=True))
    try:
        yield start
    finally:
        start.close()


class _Start:
    """One bar for each model that loads; it goes when all of it is there. Thread-safe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._is_closed = False

    def __call__(self, event: Event) -> None:
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
