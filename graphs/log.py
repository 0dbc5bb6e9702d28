"""The log of every floor: events with fields, handed to the standard library's `logging`.

Nothing is shown until a program asks for it: by `sagellm.log("info")`, or by a handler of its own.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

import structlog
from structlog.stdlib import BoundLogger
from structlog.typing import EventDict

ROOT = "sagellm"

logging.getLogger(ROOT).addHandler(logging.NullHandler())  # else warnings would go to stderr


class LogEvent:
    """The message of a log record: what happened, and its fields. As text it is one line."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value!r}" for key, value in self.fields.items())])


def get_logger(name: str) -> BoundLogger:
    """A logger below "sagellm": `log.info("worker_up", worker="decode[0]")`.

    It obeys the levels and handlers of `logging` alone, however structlog is configured.
    """
    wrapped = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            _hand_over,
        ],
        wrapper_class=BoundLogger,
    )
    return cast(BoundLogger, wrapped)


def _hand_over(_: object, __: str, line: EventDict) -> tuple[tuple[LogEvent], dict[str, Any]]:
    """The arguments of a method of `logging.Logger`."""
    error = line.pop("exc_info", None)
    return (LogEvent(line.pop("event"), line),), {"exc_info": error}
