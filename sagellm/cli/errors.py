"""Errors of commands, with cause, place, fix and exit code; and the handling of Ctrl-C."""

import errno
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from cyclopts import CycloptsError
from rich.console import Console

from sagellm.graphs.diagnostics import GraphError, UnsupportedModel
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.cluster import NoResources, WorkerUnfit
from sagellm.runtime.comm import BadKeys
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.runtime.models.folder import ModelError

FAILED, CONFIGURATION, RESOURCES, INTERRUPTED = 1, 2, 3, 130
BROKEN_PIPE = 128 + 13  # the exit code that a shell gives to a command ended by SIGPIPE

_EXHAUSTED = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your disk quota",
    errno.ENOMEM: "use a smaller model, or fewer KV blocks",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
}


@dataclass
class Failure(Exception):
    """An error that the user can fix. `where`: a file, option or address; `code`: exit code."""

    cause: str
    fix: str
    where: str = ""
    code: int = CONFIGURATION


def simulation_failure(error: Exception, where: str) -> Failure:
    """The failure of something that cannot be simulated. `error`: a SimulationError."""
    return Failure(str(error), getattr(error, "fix", ""), where)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: suggests the nearest known name, or else lists all."""
    names = list(known)
    close = nearest(name, names)
    return f"did you mean {close}?" if close else f"there are {', '.join(names)}"


def show_failure(failure: Failure) -> None:
    """Print cause, place and fix to stderr. For exit code BROKEN_PIPE, print nothing."""
    if failure.code == BROKEN_PIPE:
        # Python flushes stdout at exit, which would raise again for a broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print("[bold red]error:[/bold red]", end=" ")
    console.print(failure.cause, markup=False)
    for label, text in (("where", failure.where), ("fix", failure.fix)):
        if text:
            console.print(f"  [bold]{label}:[/bold]", end=" ")
            console.print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning to stderr; the command continues."""
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print("[bold yellow]warning:[/bold yellow]", end=" ")
    console.print(text, markup=False)


def explain(error: BaseException) -> Failure | None:
    """The Failure for an exception or group; None if it looks like a defect of sagellm.

    For None, the caller should raise the exception again: a defect needs its traceback.
    """
    return next((found for one in _leaves(error) if (found := _explain(one))), None)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _explain(error: BaseException) -> Failure | None:
    match error:
        case Failure():
            return error
        case CycloptsError():
            return Failure(_one_line(error), "see --help")
        case GraphError():
            return _graph_failure(error)
        case UnsupportedModel():
            return Failure(error.cause, error.fix, f"{error.file}, {error.field}")
        case BadKeys():
            return Failure(str(error), "`sagellm keys FOLDER` makes keys", "executor.keys")
        case NoResources():
            fix = "raise what is short: open files (ulimit -n 4096), processes or memory"
            return Failure(str(error), fix, code=RESOURCES)
        case WorkerUnfit():
            return Failure(
                str(error),
                "read the worker's lines above; `--executor tasks` shows the same in this process",
            )
        case ModelError():
            return Failure(error.cause, error.fix)
        case ChatTemplateError():
            return Failure(
                str(error), "leave --chat out, or correct the chat template in the model's folder"
            )
        case KeyboardInterrupt():
            return Failure("interrupted", "", code=INTERRUPTED)
        case MemoryError():
            return Failure("out of memory", _EXHAUSTED[errno.ENOMEM], code=RESOURCES)
        case RuntimeError() if "can't allocate memory" in str(error):  # of torch's allocator
            return Failure("out of memory", _EXHAUSTED[errno.ENOMEM], code=RESOURCES)
        case BrokenPipeError():
            return Failure("the reader of the output has left", "", code=BROKEN_PIPE)
        case OSError():
            return _system_failure(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _graph_failure(error: GraphError) -> Failure:
    """The Failure for a GraphError: one mistake with place and hint, or a list of mistakes."""
    if len(error.diagnostics) != 1:
        num = len(error.diagnostics)
        listed = "".join(f"\n  {diagnostic}" for diagnostic in error.diagnostics)
        return Failure(
            f"{num} mistakes in the graph{listed}",
            "change the graph at each place named; nothing was started",
        )
    (only,) = error.diagnostics
    where = str(only.position or ".".join(map(str, only.path)))
    what = "that option" if where.startswith("--") else "the graph at this place"
    return Failure(only.message, only.hint or f"change {what}; nothing was started", where)


def _system_failure(error: OSError) -> Failure | None:
    where = str(error.filename or _redirected_stdout(error))
    fix = _EXHAUSTED.get(error.errno or 0)
    if fix:
        return Failure(error.strerror or str(error), fix, where, RESOURCES)
    if isinstance(error, FileNotFoundError):
        return Failure("no such file", "check the path", where)
    if isinstance(error, FileExistsError):
        return Failure("the file exists", "choose another name, or remove it", where)
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError) or where:
        return Failure(error.strerror or str(error), "check the path and its permissions", where)
    return None


def _redirected_stdout(error: OSError) -> str:
    """The file that stdout is redirected to, if `error` says that a disk is full; otherwise "".

    Only an OSError from writing to stdout has no filename, so the file must be looked up.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    try:
        descriptor = sys.stdout.fileno()
        mode = os.fstat(descriptor).st_mode
        is_file = stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(descriptor))
        return f"standard output: {os.readlink(f'/proc/self/fd/{descriptor}')}" if is_file else ""
    except (OSError, ValueError, AttributeError):
        return ""


@asynccontextmanager
async def drain_on_interrupt(drain: trio.CancelScope, notice: str) -> AsyncIterator[None]:
    """Handle Ctrl-C in the block: the first cancels `drain`, the second raises KeyboardInterrupt.

    The first also prints `notice` to stderr. Works on the main thread only: Python delivers signals
    there.
    """
    with trio.open_signal_receiver(signal.SIGINT) as interrupts:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_interrupts, interrupts, drain, notice)
            yield
            nursery.cancel_scope.cancel()


async def _watch_interrupts(
    interrupts: AsyncIterator[int], drain: trio.CancelScope, notice: str
) -> None:
    async for _ in interrupts:
        if drain.cancel_called:
            raise KeyboardInterrupt
        print(notice, file=sys.stderr)
        drain.cancel()
