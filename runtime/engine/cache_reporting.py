"""Where an engine says which prefix blocks its pool has, once a step."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from sagellm.runtime.cache_changes import CacheChanged, TellCache
from sagellm.runtime.kv.cache_log import CacheLog, CacheReport
from sagellm.runtime.kv.pool import BlockPool


class CacheReporting:
    """Opens a log of the pool where somebody asks, and says when there is something to read."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._log: CacheLog | None = None
        self._on_news: Callable[[], None] = lambda: None

    def open_log(self, on_news: Callable[[], None]) -> CacheLog:
        """A new log, which has all blocks to tell. `on_news` is called after a step that changed
        some; the reader of the log before is not called any more.
        """
        self._log = self._pool.open_log()
        self._on_news = on_news
        return self._log

    def report_to(self, tell: TellCache, engine: str, replica: int) -> None:
        """Call `tell` with all reports, at once and after each step."""
        log = self.open_log(lambda: tell_all())

        def tell_all() -> None:
            while (report := log.take()) is not None:
                tell(changed_by(report, engine, replica))

        tell_all()

    def flush(self) -> None:
        """Let the reader read what has changed."""
        if self._log is not None and self._log.has_news:
            self._on_news()


@runtime_checkable
class LogsPrefixes(Protocol):
    """An engine that says which prefix blocks it has to whoever reads its log."""

    cache: CacheReporting


def changed_by(report: CacheReport, engine: str, replica: int, epoch: int = 1) -> CacheChanged:
    """A report, as a graph is told it."""
    return CacheChanged(
        engine=engine,
        replica=replica,
        epoch=epoch,
        sequence=report.sequence,
        is_first=report.is_first,
        stored=report.stored,
        dropped=report.dropped,
    )
