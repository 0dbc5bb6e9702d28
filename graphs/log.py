"""The log that all of sagellm writes: events with fields, sent to the standard library's `logging`.

A program sees nothing until it calls `sagellm.log("info")` or adds a handler.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

ROOT = "sagellm"
_CONTEXT = "structlog.contextvars"

logging.getLogger(ROOT).addHandler(logging.NullHandler())  # else warnings would go to stderr


class LogEvent:
    """The message of a log record: an event's name and its fields. `str` gives one line."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value!r}" for key, value in self.fields.items())])


class EventLogger:
    """Logs events with fields: `log.info("worker_up", worker="decode[0]")`.

    Levels and handlers of `logging` apply; the configuration of structlog does not. `exc_info`: as
    in `logging`. Fields of structlog's context variables are added.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            error = fields.pop("exc_info", None)
            line = LogEvent(event, {**_context(), **fields})
            self._logger.log(level, line, exc_info=error, stacklevel=3)


def _context() -> Mapping[str, Any]:
    """The fields of structlog's context variables.

    Does not import structlog, which imports rich: only a program that has imported it can have
    bound variables.
    """
    loaded = sys.modules.get(_CONTEXT)
    return loaded.get_contextvars() if loaded is not None else {}


def get_logger(name: str) -> EventLogger:
    """A logger below "sagellm"."""
    return EventLogger(logging.getLogger(name))
