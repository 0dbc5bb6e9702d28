"""Shows sagellm's logs on stderr, as text for people or as JSON lines. By default, none are shown.

An event is one line. Control characters are escaped, secrets are removed, and a prompt is replaced
by its length and a keyed hash. Request ids come from structlog's context variables.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeAlias

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sagellm.graphs.log import ROOT, LogEvent
from sagellm.graphs.vocabulary import nearest
from sagellm.logs.lines import LogWriter, Redactor, TextRenderer

LogFormat: TypeAlias = Literal["text", "json"]

_NUM_FRAMES = 12
_VARIABLE = "SAGELLM_LOGS"  # level:format, for child processes
_OFF = "off"
_QUIET = ("httpx2", "httpcore2")  # their line of each call repeats ours: warnings only
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Stderr:
    """Writes to the current `sys.stderr`, which may be redirected between two lines.

    If a write fails (a full disk, a closed pipe), the line is lost, and no error is raised.
    """

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


class _LogHandler(logging.StreamHandler[Any]):
    """The log handler of sagellm. `form`: the format of its lines."""

    form: LogFormat


WRITERS: list[LogWriter] = []  # at most one in a process


def log(level: str = "info", *, format: str | None = None) -> None:
    """Show sagellm's logs of this process on stderr, at `level` and above.

    `level`: "debug", "info", "warning", "error", or "off", which is the initial state. `format`:
    "text" or "json"; the default is text on a terminal, and otherwise JSON. The application's own
    set-up of logging and structlog stays unchanged. Raises ValueError for another level or format.
    """
    _check(level, (*LEVELS, _OFF), "level")
    if format is not None:
        _check(format, ("text", "json"), "format")
    ours = logging.getLogger(ROOT)
    # Over a copy, since the loop removes handlers.
    for handler in [each for each in ours.handlers if isinstance(each, _LogHandler)]:
        ours.removeHandler(handler)
    ours.propagate = level == _OFF  # else an application's root handler would show each line again
    ours.setLevel(logging.NOTSET if level == _OFF else LEVELS[level])
    if level != _OFF:
        form = choose_format(format)
        explain = structlog.processors.format_exc_info
        ours.addHandler(_handler(Redactor(), _Stderr(), explain, form))


@contextmanager
def command_logs() -> Iterator[None]:
    """Show warnings on stderr during the block: the logs of a command by default."""
    log("warning")
    try:
        yield
    finally:
        log(_OFF)


def choose_format(asked: str | None) -> LogFormat:
    """The format `asked`; for None, text if stderr is a terminal, and otherwise JSON."""
    if asked is None:
        return "text" if is_terminal() else "json"
    return "text" if asked == "text" else "json"


def is_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


def current_logs() -> tuple[str, LogFormat] | None:
    """The level and the format of sagellm's logs; None if logs are off."""
    ours = logging.getLogger(ROOT)
    for handler in (*logging.root.handlers, *ours.handlers):
        if isinstance(handler, _LogHandler):
            names = {number: name for name, number in LEVELS.items()}
            return names.get(ours.getEffectiveLevel(), "warning"), handler.form
    return None


def logs_environment() -> Mapping[str, str]:
    """Environment variables with the log settings of this process, for a child process.

    The child applies the settings by `child_logs`.
    """
    return {_VARIABLE: ":".join(current_logs() or (_OFF, ""))}


@contextmanager
def child_logs() -> Iterator[None]:
    """Show logs during the block, with the settings of the parent process."""
    level, _, form = os.environ.get(_VARIABLE, "warning").partition(":")
    with process_logs(LEVELS.get(level, logging.CRITICAL), form=form or None):
        yield


def num_dropped_lines() -> int:
    """The number of log lines that this process has dropped."""
    return sum(writer.num_dropped for writer in WRITERS)


@contextmanager
def process_logs(
    level: int, *, key: bytes = b"", known: Iterable[str] = (), form: str | None = None
) -> Iterator[None]:
    """Show all logs of this process during the block, including those of libraries.

    Only for programs of sagellm: replaces the set-up of structlog and of `logging`, and restores it
    at the end. `key`: the key for hashes of prompts. `known`: secrets to remove from every line.
    `form`: see `choose_format`.

    A thread writes the lines, so that logging never blocks. The text of an exception may contain a
    user's content, so it is logged at level debug only. The exception is event `operator_failed`:
    it has a field with the text of an error in the user's own code.
    """
    redactor, before = Redactor(key, known), structlog.get_config()
    explain = structlog.processors.format_exc_info if level <= logging.DEBUG else without_error_text
    chosen = choose_format(form)
    writer = LogWriter(_dropped_line(chosen))
    WRITERS.append(writer)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *_common(redactor, explain, chosen),
            _renderer(chosen),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(writer),  # type: ignore[arg-type]
    )
    try:
        with _routed(_handler(redactor, writer, explain, chosen), level):
            yield
    finally:
        structlog.configure(**before)
        writer.close()
        WRITERS.remove(writer)


def without_error_text(_: object, __: str, line: EventDict) -> EventDict:
    """A structlog processor that replaces an exception by the places of its traceback (innermost
    last) and its type.
    """
    found = line.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        frames = traceback.walk_tb(error.__traceback__)
        places = [f"{frame.f_globals.get('__name__')}:{number}" for frame, number in frames]
        line["exception"] = " > ".join([*places[-_NUM_FRAMES:], type(error).__name__])
    return line


def _handler(redactor: Redactor, sink: Any, explain: Processor, form: LogFormat) -> _LogHandler:
    """A handler that writes each record of sagellm or a library as a line to `sink`."""
    handler = _LogHandler(sink)
    handler.form = form
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_unpacked, *_common(redactor, explain, form)],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _renderer(form),
            ],
        )
    )
    return handler


def _unpacked(logger: WrappedLogger, name: str, line: EventDict) -> EventDict:
    """Add the fields of a record: those of sagellm's event, or the `extra` of a library."""
    record: logging.LogRecord = line["_record"]
    if isinstance(record.msg, LogEvent):
        return {**line, **record.msg.fields, "event": record.msg.name}
    line["logger"] = record.name
    line = structlog.stdlib.ExtraAdder()(logger, name, line)
    return structlog.contextvars.merge_contextvars(logger, name, line)


def _renderer(form: LogFormat) -> Processor:
    if form == "json":
        return structlog.processors.JSONRenderer()
    has_colours = is_terminal() and not os.environ.get("NO_COLOR")
    return TextRenderer(has_colours=has_colours and os.environ.get("TERM") != "dumb")


def _dropped_line(form: LogFormat) -> Callable[[int], str]:
    """A function: number of dropped lines -> the log line that reports this number."""

    def line(num: int) -> str:
        fields: EventDict = {"event": "logs_dropped", "num": num}
        stamped: Any = _stamper(form)(None, "", {**fields, "level": "warning"})
        return str(_renderer(form)(None, "", stamped))

    return line


def _stamper(form: LogFormat) -> Processor:
    """The processor that adds the time: UTC in JSON, local time in text."""
    if form == "json":
        return structlog.processors.TimeStamper(fmt="iso")
    return structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%f", utc=False)


@contextmanager
def _routed(handler: logging.Handler, level: int) -> Iterator[None]:
    """Send the records of all loggers to `handler`, at `level` and above, during the block."""
    before = [
        (each, each.handlers[:], each.propagate, each.level, each.disabled) for each in _loggers()
    ]
    for each, *_ in before:
        each.handlers, each.propagate, each.disabled = [], True, False
        each.setLevel(logging.WARNING if each.name in _QUIET else logging.NOTSET)
    logging.root.handlers = [handler]
    logging.root.setLevel(level)
    try:
        yield
    finally:
        for each, handlers, propagate, own_level, disabled in before:
            each.handlers, each.propagate, each.disabled = handlers, propagate, disabled
            each.setLevel(own_level)


def _common(redactor: Redactor, explain: Processor, form: LogFormat) -> list[Any]:
    """The processors of every line. `explain` precedes the redactor, which must clean its text."""
    return [structlog.processors.add_log_level, _stamper(form), explain, redactor]


def _loggers() -> list[logging.Logger]:
    for name in _QUIET:  # they may be imported later
        logging.getLogger(name)
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(each for each in named if isinstance(each, logging.Logger))]


def _check(name: str, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        close = nearest(str(name), known)
        fix = f"did you mean {close!r}?" if close else f"use one of {', '.join(known)}"
        raise ValueError(f"there is no log {kind} {name!r}: {fix}")
