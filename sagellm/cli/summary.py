"""The few figures shown after a run."""

import sys

import msgspec
from rich.console import Console
from rich.table import Table

from sagellm.batch.serve import Tally
from sagellm.statistics import Statistics


def show_summary(statistics: Statistics, tally: Tally | None = None) -> None:
    """A table on stderr; plain lines where that is not a terminal."""
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    rows = rows_of(statistics, tally)
    if not console.is_terminal:
        for label, value in rows:
            console.print(f"{label}: {value}", markup=False)
        return
    table = Table(*(label for label, _ in rows))
    table.add_row(*(value for _, value in rows))
    console.print(table)


def print_summary(statistics: Statistics, tally: Tally) -> None:
    """The same as one JSON object on stdout; seconds, and None for what was not measured."""
    said = {
        "answered": tally.num_answered,
        "failed": tally.num_failed,
        "skipped": tally.num_skipped,
        "ended": dict(statistics.ended),
        "tokens": statistics.num_tokens,
        "elapsed_s": statistics.elapsed_s,
        "tokens_per_s": statistics.tokens_per_s,
        "ttft_s": {"p50": statistics.ttft_p50_s, "p99": statistics.ttft_p99_s},
        "itl_s": {"p50": statistics.itl_p50_s, "p99": statistics.itl_p99_s},
        "peak_kv_ratio": statistics.peak_kv_ratio,
        "preemptions": statistics.num_preemptions,
    }
    print(msgspec.json.encode(said).decode())


def rows_of(statistics: Statistics, tally: Tally | None = None) -> list[tuple[str, str]]:
    """Label and value of each figure; without a tally it was one request."""
    return [
        ("requests", _requests(tally) if tally else "1"),
        ("tokens", str(statistics.num_tokens)),
        ("tokens/s", f"{statistics.tokens_per_s:.1f}"),
        ("TTFT p50/p99", _pair(statistics.ttft_p50_s, statistics.ttft_p99_s)),
        ("ITL p50/p99", _pair(statistics.itl_p50_s, statistics.itl_p99_s)),
        ("peak KV use", f"{statistics.peak_kv_ratio:.1%}"),
    ]


def _requests(tally: Tally) -> str:
    apart = (("failed", tally.num_failed), ("answered before", tally.num_skipped))
    extra = ", ".join(f"{num} {what}" for what, num in apart if num)
    return f"{tally.num_answered + tally.num_failed}" + (f" ({extra})" if extra else "")


def _pair(p50_s: float | None, p99_s: float | None) -> str:
    if p50_s is None or p99_s is None:
        return "-"
    return f"{p50_s * 1e3:.1f} / {p99_s * 1e3:.1f} ms"
