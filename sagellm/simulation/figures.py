"""The figures of a simulation: latencies, goodput, cost, caches, and the use of each engine."""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sagellm.errors import naming_file
from sagellm.load.report import Objective, percentile
from sagellm.runtime.containers import value_of
from sagellm.simulation.simulation_run import SimulatedRequest, SimulatedRun

_SHARES = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))


class Latency(msgspec.Struct, frozen=True):
    """The distribution of one latency, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class EngineUse(msgspec.Struct, frozen=True):
    """One replica of an engine. `busy`: the share of the elapsed time in which it computed steps.

    `kv_peak`: the highest share of leased blocks.
    """

    engine: str
    replica: int
    busy: float
    num_steps: int
    num_preemptions: int
    kv_peak: float
    prefix_hit_rate: float | None


class SimulationSummary(msgspec.Struct, frozen=True):
    """The figures of one simulation. Latencies are those of served requests.

    `itl_ms`: over all gaps between two tokens, within 1 %. `goodput_rps`: requests within the
    objective, a second. `slo_attainment`: their share of all requests; None without an objective.
    `prefix_hit_rate`: the cached share of the prompt tokens that engines looked up; None: no prompt
    could share any. `load_imbalance`: the busy time of the busiest replica of an engine over the
    mean, the largest of all engines. `cost`: replica hours * price. `cost_per_1k_tokens`: of
    generated tokens. `network_bytes`: KV that links have moved. `replica_hours`: by engine, with
    the time of starts and drains. `num_scalings`: how often the number of replicas changed.
    """

    requests: int
    served: int
    ended: dict[str, int]
    refusals: dict[str, int]
    elapsed_s: float
    ttft_ms: Latency | None
    tpot_ms: Latency | None
    itl_ms: Latency | None
    e2e_ms: Latency | None
    requests_per_s: float
    output_tokens_per_s: float
    goodput_rps: float | None
    slo_attainment: float | None
    prefix_hit_rate: float | None
    load_imbalance: float
    cost: float
    cost_per_1k_tokens: float | None
    network_bytes: float
    engines: list[EngineUse]
    phases_ms: dict[str, float]
    replica_hours: dict[str, float] = {}
    num_scalings: int = 0


def summarise(
    run: SimulatedRun, objective: Objective | None, prices: Mapping[str, float]
) -> SimulationSummary:
    """The figures of a run. A request's own TTFT objective comes before that of `objective`.

    `prices`: of an hour of one replica, by engine; without one it is 1.
    """
    served = [request for request in run.requests if request.is_ok]
    elapsed_s = run.elapsed_s
    if objective is None and any(one.slo_ttft_s is not None for one in run.requests):
        objective = Objective()
    num_tokens = sum(request.num_tokens for request in served)
    uses = [
        _use(name, number, engine.model, elapsed_s)
        for name, every in run.engines.items()
        for number, engine in enumerate(every)
    ]
    hours = {name: run.replica_s(name) / 3600 for name in run.engines}
    cost = sum(each * prices.get(name, 1.0) for name, each in hours.items())
    num_good = sum(_is_good(one, objective) for one in served) if objective else None
    gaps: Counter[int] = Counter()
    for engine in (one for every in run.engines.values() for one in every):
        gaps.update(engine.model.gaps)
    return SimulationSummary(
        requests=len(run.requests),
        served=len(served),
        ended=dict(Counter(request.end or "open" for request in run.requests).most_common()),
        refusals=dict(Counter(one.code for one in run.requests if one.code).most_common()),
        elapsed_s=elapsed_s,
        ttft_ms=latency(request.ttft_s for request in served),
        tpot_ms=latency(request.tpot_s for request in served),
        itl_ms=_weighted(gaps),
        e2e_ms=latency(request.e2e_s for request in served),
        requests_per_s=_over(len(served), elapsed_s),
        output_tokens_per_s=_over(num_tokens, elapsed_s),
        goodput_rps=None if num_good is None else _over(num_good, elapsed_s),
        slo_attainment=None if num_good is None else _over(num_good, len(run.requests)),
        prefix_hit_rate=_hit_rate(run),
        load_imbalance=_imbalance(uses),
        cost=cost,
        cost_per_1k_tokens=cost / num_tokens * 1e3 if num_tokens else None,
        network_bytes=run.links.num_bytes,
        engines=uses,
        phases_ms=_phases(served),
        replica_hours=hours,
        num_scalings=sum(len(changes) - 1 for changes in run.counts.values()),
    )


def latency(seconds: Iterable[float | None]) -> Latency | None:
    """The distribution of latencies; None without any."""
    ordered = sorted(one * 1e3 for one in seconds if one is not None)
    if not ordered:
        return None
    shares = {name: percentile(ordered, share) for name, share in _SHARES}
    return Latency(mean=fmean(ordered), max=ordered[-1], **shares)


def _weighted(gaps: Mapping[int, int]) -> Latency | None:
    """The distribution of a histogram."""
    total = sum(gaps.values())
    if not total:
        return None
    ordered = sorted(gaps)
    mean = sum(value_of(bucket) * count for bucket, count in gaps.items()) / total
    found = {}
    for name, share in _SHARES:
        left = share * total
        for bucket in ordered:
            left -= gaps[bucket]
            if left <= 0:
                found[name] = value_of(bucket) * 1e3
                break
    return Latency(mean=mean * 1e3, max=value_of(ordered[-1]) * 1e3, **found)


def _is_good(request: SimulatedRequest, objective: Objective) -> bool:
    ttft_s, tpot_s = request.ttft_s, request.tpot_s
    bound_s = objective.ttft_s if request.slo_ttft_s is None else request.slo_ttft_s
    is_prompt = bound_s is None or (ttft_s is not None and ttft_s <= bound_s)
    return is_prompt and (objective.itl_s is None or tpot_s is None or tpot_s <= objective.itl_s)


def _use(name: str, number: int, model: Any, elapsed_s: float) -> EngineUse:
    load = model.load
    return EngineUse(
        engine=name,
        replica=number,
        busy=_over(model.busy_s, elapsed_s),
        num_steps=load.num_steps,
        num_preemptions=load.num_preemptions,
        kv_peak=_over(load.peak_leased_blocks, load.num_blocks),
        prefix_hit_rate=_over(load.num_prefix_hits, load.num_prefix_queries)
        if load.num_prefix_queries
        else None,
    )


def _hit_rate(run: SimulatedRun) -> float | None:
    loads = [engine.load for every in run.engines.values() for engine in every]
    num_queries = sum(load.num_prefix_queries for load in loads)
    return sum(load.num_prefix_hits for load in loads) / num_queries if num_queries else None


def _imbalance(uses: Sequence[EngineUse]) -> float:
    found = 1.0
    for engine in dict.fromkeys(use.engine for use in uses):
        busy = [use.busy for use in uses if use.engine == engine]
        if sum(busy):
            found = max(found, max(busy) / fmean(busy))
    return found


def _phases(served: Sequence[SimulatedRequest]) -> dict[str, float]:
    """The mean milliseconds of each phase of served requests."""
    if not served:
        return {}
    names = served[0].phases._fields
    return {
        name.removesuffix("_s"): fmean(getattr(one.phases, name) for one in served) * 1e3
        for name in names
    }


def _over(count: float, of: float) -> float:
    return count / of if of > 0 else 0.0


class Estimate(msgspec.Struct, frozen=True):
    """A figure over several seeds: its mean, its standard deviation, and its interval."""

    mean: float
    deviation: float
    low: float
    high: float


def over_seeds(summaries: Sequence[SimulationSummary]) -> dict[str, Estimate]:
    """Each number of the summaries over all seeds, by its name, such as "ttft_ms.p50"."""
    flat = [dict(_numbers(msgspec.to_builtins(one))) for one in summaries]
    names = [name for name in flat[0] if all(name in one for one in flat)]
    return {name: _estimate([one[name] for one in flat]) for name in names}


def _estimate(values: Sequence[float]) -> Estimate:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return Estimate(fmean(values), deviation, min(values), max(values))


def _numbers(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, one in value.items():
        if isinstance(one, Mapping):
            yield from _numbers(one, f"{prefix}{name}.")
        elif isinstance(one, int | float):
            yield f"{prefix}{name}", float(one)


def write_csv(path: Path, requests: Sequence[SimulatedRequest]) -> None:
    """Write one line for each request. Raises OSError that names the file."""
    names = [one.name for one in fields(SimulatedRequest) if one.name != "phases"]
    phases = list(requests[0].phases._fields) if requests else []
    columns = [*names, "ttft_s", "tpot_s", "e2e_s", *phases]
    with naming_file(path), path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for one in requests:
            own = [getattr(one, name) for name in columns[: -len(phases) or None]]
            table.writerow([*own, *one.phases])


_LATENCIES = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("end to end", "e2e_ms"),
)


def show(console: Console, summary: SimulationSummary, took_s: float) -> None:
    """Print rates, a table of latencies, and a table of engines."""
    for label, value in _lines(summary, took_s):
        console.print(f"{label + ':':18}{value}", markup=False)
    table = Table("ms", "mean", *(name for name, _ in _SHARES), "max")
    for label, name in _LATENCIES:
        one: Latency | None = getattr(summary, name)
        if one is not None:
            shares = [getattr(one, share) for share, _ in _SHARES]
            table.add_row(label, *(f"{value:.1f}" for value in (one.mean, *shares, one.max)))
    console.print(table)
    table = Table("engine", "replicas", "busy", "busiest", "KV peak", "steps", "preempted")
    for name in dict.fromkeys(use.engine for use in summary.engines):
        uses = [use for use in summary.engines if use.engine == name]
        table.add_row(
            name,
            str(len(uses)),
            f"{fmean(use.busy for use in uses):.1%}",
            f"{max(use.busy for use in uses):.1%}",
            f"{max(use.kv_peak for use in uses):.1%}",
            str(sum(use.num_steps for use in uses)),
            str(sum(use.num_preemptions for use in uses)),
        )
    console.print(table)


_SWEPT: tuple[tuple[str, Callable[[SimulationSummary], str]], ...] = (
    ("unserved", lambda one: str(one.requests - one.served)),
    ("TTFT p50", lambda one: f"{one.ttft_ms.p50:.1f}" if one.ttft_ms else ""),
    ("TTFT p99", lambda one: f"{one.ttft_ms.p99:.1f}" if one.ttft_ms else ""),
    ("TPOT p50", lambda one: f"{one.tpot_ms.p50:.2f}" if one.tpot_ms else ""),
    ("TPOT p99", lambda one: f"{one.tpot_ms.p99:.2f}" if one.tpot_ms else ""),
    ("requests/s", lambda one: f"{one.requests_per_s:.2f}"),
    ("goodput", lambda one: "" if one.goodput_rps is None else f"{one.goodput_rps:.2f}"),
    ("attained", lambda one: "" if one.slo_attainment is None else f"{one.slo_attainment:.1%}"),
    ("hits", lambda one: "" if one.prefix_hit_rate is None else f"{one.prefix_hit_rate:.1%}"),
    ("imbalance", lambda one: f"{one.load_imbalance:.2f}"),
    ("cost", lambda one: f"{one.cost:.3f}"),
)


_UNINFORMATIVE = {"", "0", "1.00"}


def show_sweep(
    console: Console,
    values: Sequence[Mapping[str, Any]],
    summaries: Sequence[SimulationSummary],
) -> None:
    """Print one line for each point of a sweep. Latencies are in milliseconds. Columns without
    information are left out.
    """
    columns = {title: [text(summary) for summary in summaries] for title, text in _SWEPT}
    shown = {title: texts for title, texts in columns.items() if set(texts) - _UNINFORMATIVE}
    table = Table(*values[0], *shown, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for row, chosen in enumerate(values):
        table.add_row(*map(str, chosen.values()), *(texts[row] for texts in shown.values()))
    console.print(table)


def _lines(summary: SimulationSummary, took_s: float) -> Iterable[tuple[str, str]]:
    others = {name: number for name, number in summary.ended.items() if name != "length"}
    listed = ", ".join(f"{number} {name}" for name, number in others.items())
    shown = f" ({listed})" if listed else ""
    yield "requests", f"{summary.served} of {summary.requests} served{shown}"
    per_s = summary.requests / took_s if took_s > 0 else 0.0
    yield "time", f"{summary.elapsed_s:.1f} s, simulated in {took_s:.2f} s ({per_s:.0f} requests/s)"
    rate = f"{summary.requests_per_s:.2f} requests/s"
    yield "throughput", f"{rate}, {summary.output_tokens_per_s:.1f} tokens/s out"
    if summary.goodput_rps is not None:
        yield "goodput", f"{summary.goodput_rps:.2f}/s, {summary.slo_attainment:.1%} of requests"
    if summary.prefix_hit_rate is not None:
        yield "prefix hit rate", f"{summary.prefix_hit_rate:.1%}"
    yield "load imbalance", f"{summary.load_imbalance:.3f} (busiest replica over the mean)"
    each = summary.cost_per_1k_tokens
    yield "cost", f"{summary.cost:.3f}" + ("" if each is None else f", {each:.6f} per 1,000 tokens")
    if summary.num_scalings:
        hours = ", ".join(f"{name} {one:.3f}" for name, one in summary.replica_hours.items())
        yield "replica hours", f"{hours}; their number changed {summary.num_scalings} times"
    phases = ", ".join(f"{name} {value:.1f}" for name, value in summary.phases_ms.items())
    if phases:
        yield "mean phases", f"{phases} ms"
