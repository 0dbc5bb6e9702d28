"""Where logs go: to stderr as JSON lines, unless the application has configured structlog."""

import logging
import sys
from typing import Any

import structlog


class _Stderr:
    """Looks `sys.stderr` up for each line: whoever redirects it later gets the logs."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure_logs(level: int = logging.WARNING) -> None:
    """Idempotent, and silent where structlog is configured already."""
    if structlog.is_configured():
        return
    stderr: Any = _Stderr()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stderr),
    )
