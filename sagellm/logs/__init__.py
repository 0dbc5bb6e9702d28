"""Where logs go: to stderr, as text for people or as JSON lines, once somebody asks for them.

A line is one line: control characters in its values are escaped, secrets are taken out of it, and
of a prompt it holds a length and a keyed hash. Request ids come from structlog's context variables.
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
_VARIABLE = "SAGELLM_LOGS"  # what a process that we start is to show: level:format
_OFF = "off"
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


class _LogHandler(logging.StreamHandler[Any]):
    """Our own handler, which shows records in `form`."""

    form: LogFormat


WRITERS: list[LogWriter] = []  # of this process; there is one at a time


def log(level: str = "info", *, format: str | None = None) -> None:
    """Show what sagellm logs in this process on stderr, from a level on: "debug", "info",
    "warning", "error", or "off" as at the start.

    `format`: "text" or "json"; text on a terminal, JSON elsewhere, unless given. The application's
    own logging and structlog stay as they are. Raises ValueError for another level or format.
    """
    _check(level, (*LEVELS, _OFF), "level")
    if format is not None:
        _check(format, ("text", "json"), "format")
    ours = logging.getLogger(ROOT)
    for handler in [each for each in ours.handlers if isinstance(each, _LogHandler)]:
        ours.removeHandler(handler)
    ours.propagate = level == _OFF  # else an application that shows all logs would show them twice
    ours.setLevel(logging.NOTSET if level == _OFF else LEVELS[level])
    if level != _OFF:
        form = choose_format(format)
        explain = structlog.processors.format_exc_info
        ours.addHandler(_handler(Redactor(), _Stderr(), explain, form))


@contextmanager
def command_logs() -> Iterator[None]:
    """While entered, the warnings of a command of ours go to stderr."""
    log("warning")
    try:
        yield
    finally:
        log(_OFF)


def choose_format(asked: str | None) -> LogFormat:
    """As asked; else text where stderr is a terminal."""
    if asked is None:
        return "text" if is_terminal() else "json"
    return "text" if asked == "text" else "json"


def is_terminal() -> bool:
    """Whether a person may read stderr."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def current_logs() -> tuple[str, LogFormat] | None:
    """The level and the format in which sagellm's logs are shown; None where they are not."""
    ours = logging.getLogger(ROOT)
    for handler in (*logging.root.handlers, *ours.handlers):
        if isinstance(handler, _LogHandler):
            names = {number: name for name, number in LEVELS.items()}
            return names.get(ours.getEffectiveLevel(), "warning"), handler.form
    return None


def logs_environment() -> Mapping[str, str]:
    """The environment by which a process that we start shows what is shown here: see
    `child_logs`.
    """
    return {_VARIABLE: ":".join(current_logs() or (_OFF, ""))}


@contextmanager
def child_logs() -> Iterator[None]:
    """While entered, this process shows what the one that started it shows."""
    level, _, form = os.environ.get(_VARIABLE, "warning").partition(":")
    with process_logs(LEVELS.get(level, logging.CRITICAL), form=form or None):
        yield


def num_dropped_lines() -> int:
    """Log lines of this process that nobody took."""
    return sum(writer.num_dropped for writer in WRITERS)


@contextmanager
def process_logs(
    level: int, *, key: bytes = b"", known: Iterable[str] = (), form: str | None = None
) -> Iterator[None]:
    """While entered, all that this process logs goes there: what libraries log too.

    For programs of our own: it replaces what structlog and the standard module were set up with.
    `key` keys the hashes of prompts; `known` are secrets that no line may hold. The text of an
    exception, which may hold anything, is logged at level debug only; `operator_failed` has that
    of the user's own code as a field. Lines are written by a thread: logging waits for nobody.
    `form`: "text" or "json", see `choose_format`.
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
    """Of an exception its kind and where it came from, innermost last."""
    found = line.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        frames = traceback.walk_tb(error.__traceback__)
        places = [f"{frame.f_globals.get('__name__')}:{number}" for frame, number in frames]
        line["exception"] = " > ".join([*places[-_NUM_FRAMES:], type(error).__name__])
    return line


def _handler(redactor: Redactor, sink: Any, explain: Processor, form: LogFormat) -> _LogHandler:
    """What writes a record, ours or a library's, as a line."""
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
    """The fields of a record: of an event of ours, or what a library gave as `extra`."""
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
    """The line that says how many lines were dropped."""

    def line(num: int) -> str:
        fields: EventDict = {"event": "logs_dropped", "num": num}
        stamped: Any = _stamper(form)(None, "", {**fields, "level": "warning"})
        return str(_renderer(form)(None, "", stamped))

    return line


def _stamper(form: LogFormat) -> Processor:
    """Of the local time where people read it."""
    if form == "json":
        return structlog.processors.TimeStamper(fmt="iso")
    return structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%f", utc=False)


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


def _common(redactor: Redactor, explain: Processor, form: LogFormat) -> list[Any]:
    """The traceback becomes text before the redactor, so that it reads that too."""
    return [structlog.processors.add_log_level, _stamper(form), explain, redactor]


def _loggers() -> list[logging.Logger]:
    named = logging.root.manager.loggerDict.values()
    return [logging.root, *(each for each in named if isinstance(each, logging.Logger))]


def _check(name: str, known: tuple[str, ...], kind: str) -> None:
    if name not in known:
        close = nearest(str(name), known)
        fix = f"did you mean {close!r}?" if close else f"use one of {', '.join(known)}"
        raise ValueError(f"there is no log {kind} {name!r}: {fix}")
