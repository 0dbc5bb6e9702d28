"""What commands that measure share: plots, which need an extra, and a bar that counts requests."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sagellm.cli.errors import RESOURCES, Failure


def plotter(module: str) -> ModuleType:
    """The module that draws plots. Raises Failure if matplotlib is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        cause = "--plot needs matplotlib, which is not installed"
        fix = f"{sys.executable} -m pip install matplotlib, or leave --plot out"
        raise Failure(cause, fix, code=RESOURCES) from None


@contextmanager
def request_progress(
    total: int | None, what: str = "requests"
) -> Iterator[Callable[[object], None]]:
    """Show a bar on stderr if it is a terminal; yield a callable that counts one more."""
    console = Console(file=sys.stderr)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda record: bar.advance(task)
