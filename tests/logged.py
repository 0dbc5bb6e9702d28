"""What sagellm logs while a test runs, as fields."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sagellm.graphs.log import ROOT, LogEvent

Line = dict[str, Any]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, LogEvent):
            fields = {**record.msg.fields, "exc_info": record.exc_info}
            level = record.levelname.lower()
            self.lines.append({**fields, "event": record.msg.name, "log_level": level})


@contextmanager
def logged() -> Iterator[list[Line]]:
    """The lines of every level, as they come."""
    logger, kept = logging.getLogger(ROOT), _Kept()
    before = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.DEBUG)
    try:
        yield kept.lines
    finally:
        logger.removeHandler(kept)
        logger.setLevel(before)
