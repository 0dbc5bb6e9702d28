"""The log that all of sagellm writes: events with fields, sent to the standard library's `logging`.

A program sees nothing until it calls `sagellm.log("info")` or adds a handler.
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
    """The message of a log record: an event's name and its fields. `str` gives one line."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value!r}" for key, value in self.fields.items())])


def get_logger(name: str) -> BoundLogger:
    """A logger below "sagellm": `log.info("worker_up", worker="decode[0]")`.

    Levels and handlers of `logging` apply; the configuration of structlog does not.
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
    """Convert an event to the arguments of a method of `logging.Logger`. A structlog processor."""
    error = line.pop("exc_info", None)
    return (LogEvent(line.pop("event"), line),), {"exc_info": error}
