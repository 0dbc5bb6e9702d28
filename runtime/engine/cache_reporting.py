"""Where an engine says which prefix blocks its pool has, once a step."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from sagellm.runtime.cache_changes import CacheChanged, ReportsCache, TellCache, hashes_in
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


class CacheMirror:
    """The prefix blocks of an engine that reports to a function, and a log of them for a reader
    that may be slow. `on_news` is called after each report.
    """

    def __init__(self) -> None:
        self.on_news: Callable[[], None] = lambda: None
        self._blocks: dict[bytes, None] = {}
        self.log = CacheLog(lambda: self._blocks)

    def take(self, changed: CacheChanged) -> None:
        """Take a report of the engine."""
        if changed.is_first:
            self._blocks.clear()
            self.log.begin_anew()
        for block in hashes_in(changed.stored):
            self._blocks[block] = None
            self.log.note(block, is_stored=True)
        for block in hashes_in(changed.dropped):
            self._blocks.pop(block, None)
            self.log.note(block, is_stored=False)
        self.on_news()


def open_cache_log(engine: ReportsCache, on_news: Callable[[], None]) -> CacheLog:
    """A new log of an engine's prefix blocks. `on_news` is called when there is more to read."""
    if isinstance(engine, LogsPrefixes):
        return engine.cache.open_log(on_news)
    mirror = CacheMirror()
    engine.report_cache(mirror.take)
    mirror.on_news = on_news
    return mirror.log


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
