"""The results of a load: a table to read, JSON and CSV to keep, and plots."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from sagellm.load.sender import Record
from sagellm.load.summary import Objective, Spread, Summary
from sagellm.naming import naming

_SIZE_INCHES, _DPI = (12.0, 4.0), 120


def plot_cdf(path: Path, records: Sequence[Record], objective: Objective | None) -> None:
    """The cumulative distributions of TTFT, ITL and end-to-end time of what was served."""
    served = [record for record in records if record.is_ok]
    wanted = objective or Objective()
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    ttft, itl, e2e = figure.subplots(1, 3, sharey=True)
    _curve(ttft, "TTFT", (record.ttft_s for record in served), wanted.ttft_s)
    _curve(itl, "ITL", (itl_s for record in served for itl_s in record.itl_s), wanted.itl_s)
    _curve(e2e, "end to end", (record.e2e_s for record in served), None)
    ttft.set_ylabel("share of all")
    figure.suptitle(f"{len(served)} of {len(records)} requests served")
    with naming(path):
        figure.savefig(path, dpi=_DPI)


def _curve(axes: Axes, title: str, values: Iterable[float | None], bound_s: float | None) -> None:
    """One distribution in ms; a dashed line where the objective is."""
    ordered_ms = sorted(value * 1e3 for value in values if value is not None)
    shares = [rank / len(ordered_ms) for rank in range(1, len(ordered_ms) + 1)]
    axes.step(ordered_ms, shares, where="post")
    axes.set(title=title, xlabel="ms", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if bound_s is not None:
        axes.axvline(bound_s * 1e3, linestyle="--", color="tab:red")


WHOLE, TABLE = "bench.json", "requests.csv"
_LATENCIES = {
    "TTFT": "ttft_s",
    "ITL": "itl_s",
    "TPOT": "tpot_s",
    "end to end": "e2e_s",
    "sent late": "lag_s",
}
_SHARES = ("mean", "p50", "p90", "p95", "p99", "max")
_SAID = (*Record.__dataclass_fields__, "ttft_s", "tpot_s", "e2e_s", "lag_s")
_COLUMNS = tuple(name for name in _SAID if name != "itl_s")


def row(record: Record) -> dict[str, Any]:
    """One request as plain data, with what follows from it."""
    return {name: getattr(record, name) for name in _SAID}


def write_whole(
    path: Path, settings: Mapping[str, Any], summary: Summary, records: Sequence[Record]
) -> None:
    """Settings, summary and every request with its ITLs, as one JSON object."""
    rows = [row(record) for record in records]
    whole = {"settings": settings, "summary": summary, "requests": rows}
    with naming(path):
        path.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1) + b"\n")


def write_table(path: Path, records: Sequence[Record]) -> None:
    """One line a request; its ITLs are in the JSON alone."""
    with naming(path), path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(row(record) for record in records)


def show(console: Console, summary: Summary) -> None:
    """Counts and rates, and a table of percentiles in milliseconds."""
    for label, value in figures(summary):
        console.print(f"{label + ':':18}{value}", markup=False)
    table = Table("ms", *_SHARES)
    for label, name in _LATENCIES.items():
        spread: Spread | None = getattr(summary, name)
        if spread is not None:
            table.add_row(label, *(f"{getattr(spread, share) * 1e3:.1f}" for share in _SHARES))
    console.print(table)
    for warning in warnings(summary):
        console.print(f"warning: {warning}", markup=False)


def figures(summary: Summary) -> Iterator[tuple[str, str]]:
    """Label and value of each count and rate."""
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


def warnings(summary: Summary) -> Iterator[str]:
    """What makes the figures say less than they seem to."""
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
    said = [f"{name} <= {s * 1e3:g} ms" for name, s in bounds.items() if s is not None]
    return f" ({', '.join(said)})"
