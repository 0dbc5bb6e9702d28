"""Where logs go: to stderr as JSON lines, unless the application has configured structlog.

A line is one line: whatever was in its values is escaped, secrets are taken out of it, and of a
prompt it holds a length and a keyed hash. Request ids come from structlog's context variables.
"""

import logging
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from sagellm.log_writer import LogWriter
from sagellm.redaction import Redactor

_NUM_FRAMES = 12
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Stderr:
    """Looks `sys.stderr` up for each line: whoever redirects it later gets the logs. A line that
    cannot be written (a full disk, a reader that left) is lost, and nothing else with it.
    """

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


WRITERS: list[LogWriter] = []  # of this process; there is one at a time


def configure_logs(level: int = logging.WARNING) -> None:
    """Idempotent, and silent where structlog is configured already."""
    if not structlog.is_configured():
        _configure(level, Redactor(), _Stderr())


def num_dropped_lines() -> int:
    """Log lines of this process that nobody took."""
    return sum(writer.num_dropped for writer in WRITERS)


@contextmanager
def own_logs(level: int, *, key: bytes = b"", known: Iterable[str] = ()) -> Iterator[None]:
    """While entered, all that this process logs goes there: what libraries log too.

    For programs of our own: it replaces what structlog and the standard module were set up with.
    `key` keys the hashes of prompts; `known` are secrets that no line may hold. The text of an
    exception, which may hold anything, is logged at level debug only. Lines are written by a
    thread: logging waits for nobody.
    """
    redactor, before = Redactor(key, known), structlog.get_config()
    explain = structlog.processors.format_exc_info if level <= logging.DEBUG else without_text
    writer = LogWriter()
    WRITERS.append(writer)
    _configure(level, redactor, writer, explain)
    try:
        with _routed(_handler(redactor, writer, explain), level):
            yield
    finally:
        structlog.configure(**before)
        writer.close()
        WRITERS.remove(writer)


def without_text(_: object, __: str, line: EventDict) -> EventDict:
    """Of an exception its kind and where it came from, innermost last."""
    found = line.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        frames = traceback.walk_tb(error.__traceback__)
        places = [f"{frame.f_globals.get('__name__')}:{number}" for frame, number in frames]
        line["exception"] = " > ".join([*places[-_NUM_FRAMES:], type(error).__name__])
    return line


def _configure(
    level: int,
    redactor: Redactor,
    sink: Any,
    explain: Processor = structlog.processors.format_exc_info,
) -> None:
    structlog.configure(
        processors=[*_common(redactor, explain), structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sink),
    )


def _handler(redactor: Redactor, sink: Any, explain: Processor) -> logging.Handler:
    """What writes a record of the standard module as a line like ours."""
    handler = logging.StreamHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                *_common(redactor, explain),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    return handler


@contextmanager
def _routed(handler: logging.Handler, level: int) -> Iterator[None]:
    """The one handler and the one level of all loggers, in place of theirs."""
    before = [
        (each, each.handlers[:], each.propagate, each.level, each.disabled) for each in _loggers()
    ]
    for each, *_ in before:
        each.handlers, each.propagate, each.disabled = [], True, False
        each.setLevel(logging.NOTSET)
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    try:
        yield
    finally:
        for each, handlers, propagate, own_level, disabled in before:
            each.handlers, each.propagate, each.disabled = handlers, propagate, disabled
            each.setLevel(own_level)


def _common(redactor: Redactor, explain: Processor) -> list[Any]:
    """The traceback becomes text before the redactor, so that it reads that too."""
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        explain,
        redactor,
    ]


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(each for each in named if isinstance(each, logging.Logger))]
