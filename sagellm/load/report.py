"""Summarises the records of a load, and writes the results as table, JSON and CSV."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from sagellm.errors import naming_file
from sagellm.load import RequestRecord

# Share of one core. A client above it may be the bottleneck that is measured, not the server.
SATURATED_CPU_RATIO = 0.8


class Spread(msgspec.Struct, frozen=True):
    """The distribution of one latency, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Objective(msgspec.Struct, frozen=True):
    """The bounds of a good request, in seconds; None is no bound. `itl_s` bounds TPOT, not ITLs."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def holds(self, record: RequestRecord) -> bool:
        """Whether a request was served within the bounds. An answer without TPOT meets `itl_s`."""
        if not record.is_ok:
            return False
        ttft_s, tpot_s = record.ttft_s, record.tpot_s
        is_prompt = self.ttft_s is None or (ttft_s is not None and ttft_s <= self.ttft_s)
        return is_prompt and (self.itl_s is None or tpot_s is None or tpot_s <= self.itl_s)


class Goodput(msgspec.Struct, frozen=True):
    """The requests that met the objective: number, share of all requests, and rate per second."""

    objective: Objective
    num_good: int
    ratio: float
    per_s: float


class ClientCost(msgspec.Struct, frozen=True):
    """The cost of the load generator itself. Latencies measured by a busy client are unreliable."""

    cpu_s: float
    cpu_ratio: float  # of one core
    cpu_us_per_event: float | None
    num_open_peak: int

    @property
    def is_saturated(self) -> bool:
        return self.cpu_ratio > SATURATED_CPU_RATIO


class Summary(msgspec.Struct, frozen=True):
    """The figures of one load. Rates are requests or tokens a second.

    `offered_per_s`: the planned rate of requests; None in a closed loop. `sent_per_s`: the rate at
    which this client sent them. `reached_per_s`: the rate of served requests.
    """

    elapsed_s: float
    num_sent: int
    num_ok: int
    num_failed: int
    errors: dict[str, int]
    num_refusals: int  # responses 429 and 503, including those to retries
    num_retries: int
    offered_per_s: float | None
    sent_per_s: float
    reached_per_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    tokens_per_event: float | None
    is_token_count_known: bool  # False for a server without usage: each event counted as a token
    ttft_s: Spread | None
    itl_s: Spread | None
    tpot_s: Spread | None
    e2e_s: Spread | None
    lag_s: Spread | None
    goodput: Goodput | None
    client: ClientCost


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of sorted values, by linear interpolation between the two closest ranks."""
    at = (len(ordered) - 1) * share
    low, high = ordered[floor(at)], ordered[ceil(at)]
    return low + (high - low) * (at - floor(at))


def spread(values: Iterable[float | None]) -> Spread | None:
    """The distribution of values; None for no values."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Spread(sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def summarise(
    records: Sequence[RequestRecord],
    *,
    cpu_s: float,
    num_open_peak: int,
    objective: Objective | None = None,
    is_open_loop: bool = False,
) -> Summary:
    """Summarise the records of a load.

    Latencies cover served requests only. Rates refer to the time between the first planned request
    and the end of the last request.
    """
    served = [record for record in records if record.is_ok]
    start_s = min((record.planned_s for record in records), default=0.0)
    elapsed_s = max((record.ended_s for record in records), default=0.0) - start_s
    num_tokens = sum(record.num_tokens for record in served)
    num_events = sum(record.num_events for record in records)  # failed requests cost CPU time too
    return Summary(
        elapsed_s=elapsed_s,
        num_sent=len(records),
        num_ok=len(served),
        num_failed=len(records) - len(served),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        num_refusals=sum(record.num_refusals for record in records),
        num_retries=sum(record.num_attempts - 1 for record in records),
        offered_per_s=_rate([record.planned_s for record in records]) if is_open_loop else None,
        sent_per_s=_rate([record.sent_s for record in records]),
        reached_per_s=_over(len(served), elapsed_s),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in served),
        completion_tokens=num_tokens,
        tokens_per_s=_over(num_tokens, elapsed_s),
        tokens_per_event=_share(num_tokens, sum(record.num_events for record in served)),
        is_token_count_known=all(record.completion_tokens is not None for record in served),
        **_latencies(served, records),
        goodput=_goodput(records, objective, elapsed_s) if objective is not None else None,
        client=ClientCost(
            cpu_s=cpu_s,
            cpu_ratio=_over(cpu_s, elapsed_s),
            cpu_us_per_event=_share(cpu_s * 1e6, num_events),
            num_open_peak=num_open_peak,
        ),
    )


def _latencies(served: Sequence[RequestRecord], records: Sequence[RequestRecord]) -> dict[str, Any]:
    return {
        "ttft_s": spread(record.ttft_s for record in served),
        "itl_s": spread(itl_s for record in served for itl_s in record.itl_s),
        "tpot_s": spread(record.tpot_s for record in served),
        "e2e_s": spread(record.e2e_s for record in served),
        # The lag measures this client, not the server: failed requests count, too.
        "lag_s": spread(record.lag_s for record in records),
    }


def _goodput(records: Sequence[RequestRecord], objective: Objective, elapsed_s: float) -> Goodput:
    num_good = sum(objective.holds(record) for record in records)
    return Goodput(
        objective, num_good, _over(num_good, float(len(records))), _over(num_good, elapsed_s)
    )


def _rate(times_s: Sequence[float]) -> float:
    """Events per second: the number of gaps between events, divided by their total time."""
    return _over(len(times_s) - 1, max(times_s) - min(times_s)) if times_s else 0.0


def _over(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _share(count: float, of: int) -> float | None:
    return count / of if of else None


JSON_FILE, CSV_FILE = "bench.json", "requests.csv"
_LATENCIES = {
    "TTFT": "ttft_s",
    "ITL": "itl_s",
    "TPOT": "tpot_s",
    "end to end": "e2e_s",
    "sent late": "lag_s",
}
_SHARES = ("mean", "p50", "p90", "p95", "p99", "max")
_RECORD_FIELDS = (*RequestRecord.__dataclass_fields__, "ttft_s", "tpot_s", "e2e_s", "lag_s")
_COLUMNS = tuple(name for name in _RECORD_FIELDS if name != "itl_s")


def record_row(record: RequestRecord) -> dict[str, Any]:
    """A record as a dict of its fields and its latencies."""
    return {name: getattr(record, name) for name in _RECORD_FIELDS}


def write_json_file(
    path: Path, settings: Mapping[str, Any], summary: Summary, records: Sequence[RequestRecord]
) -> None:
    """Write settings, summary and all requests with their ITLs, as one JSON object."""
    rows = [record_row(record) for record in records]
    whole = {"settings": settings, "summary": summary, "requests": rows}
    with naming_file(path):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")


def write_csv_file(path: Path, records: Sequence[RequestRecord]) -> None:
    """Write one CSV line for each request, without its ITLs."""
    with naming_file(path), path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(record_row(record) for record in records)


def show_report(console: Console, summary: Summary) -> None:
    """Print counts, rates, and a table of percentiles in milliseconds."""
    for label, value in figure_rows(summary):
        console.print(f"{label + ':':18}{value}", markup=False)
    table = Table("ms", *_SHARES)
    for label, name in _LATENCIES.items():
        spread: Spread | None = getattr(summary, name)
        if spread is not None:
            table.add_row(label, *(f"{getattr(spread, share) * 1e3:.1f}" for share in _SHARES))
    console.print(table)
    for warning in summary_warnings(summary):
        console.print(f"warning: {warning}", markup=False)


def figure_rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Label and value of each count and rate, as printed text."""
    yield "requests", f"{summary.num_ok} served, {summary.num_failed} failed{_errors(summary)}"
    if summary.num_refusals:
        yield "refusals", f"{summary.num_refusals}, {summary.num_retries} tried again"
    yield "rate", _rates(summary)
    yield "tokens", f"{summary.prompt_tokens} in, {summary.completion_tokens} out"
    yield "tokens/s", f"{summary.tokens_per_s:.1f}"
    if summary.tokens_per_event is not None:
        yield "tokens per event", f"{summary.tokens_per_event:.2f}"
    if summary.goodput is not None:
        good = summary.goodput
        yield "goodput", f"{good.ratio:.1%} of requests, {good.per_s:.2f}/s{_objective(summary)}"
    client = summary.client
    per_event = client.cpu_us_per_event
    each = "" if per_event is None else f", {per_event:.0f} us an event"
    yield "this client", f"{client.cpu_ratio:.1%} of a core{each}, {client.num_open_peak} open"


def summary_warnings(summary: Summary) -> Iterator[str]:
    """Reasons to doubt the figures."""
    if summary.client.is_saturated:
        yield "this client was busy all the time; the latencies may be its own"
    if not summary.is_token_count_known:
        yield "the server tells no usage; every event was counted as one token"
    offered = summary.offered_per_s
    if offered and summary.sent_per_s < 0.95 * offered:
        yield f"only {summary.sent_per_s / offered:.0%} of the offered rate was sent"


def _errors(summary: Summary) -> str:
    listed = ", ".join(f"{num} {name}" for name, num in summary.errors.items())
    return f" ({listed})" if listed else ""


def _rates(summary: Summary) -> str:
    reached = f"{summary.reached_per_s:.2f}/s answered in {summary.elapsed_s:.1f} s"
    if summary.offered_per_s is None:
        return reached
    return f"{summary.offered_per_s:.2f}/s offered, {summary.sent_per_s:.2f}/s sent, {reached}"


def _objective(summary: Summary) -> str:
    assert summary.goodput is not None
    wanted = summary.goodput.objective
    bounds = {"TTFT": wanted.ttft_s, "TPOT": wanted.itl_s}
    texts = [f"{name} <= {s * 1e3:g} ms" for name, s in bounds.items() if s is not None]
    return f" ({', '.join(texts)})"
