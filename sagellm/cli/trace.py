"""`sagellm trace`: where the time of requests went, from a decision log."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import Failure
from sagellm.errors import naming_file
from sagellm.extensions import RESOLVER
from sagellm.graphs.text.codec import from_msgpack
from sagellm.load.report import percentile
from sagellm.runtime.core.decision_log import DecisionReader, LogError
from sagellm.tracing.critical_path import PHASES, RequestPath, perfetto_events, request_paths
from sagellm.tracing.operator_budgets import (
    COLUMNS,
    BudgetMeter,
    budget_report,
    budget_row,
    share_row,
)

_FIX = "name a file that --decisions wrote"


def run(
    log: Path,
    request_id: str | None = None,
    /,
    *,
    slowest: Annotated[int, Parameter(validator=Number(gte=1))] = 5,
    perfetto: Path | None = None,
    json: bool = False,
) -> int:
    """Show in which phases requests spent their time, of a graph that ran with --decisions.

    With a request id, the path of that request; else the phases of all, and the slowest requests.

    Parameters
    ----------
    log
        What --decisions wrote, of `run`, `serve` or `simulate`.
    request_id
        The request.
    slowest
        How many of the slowest requests to list.
    perfetto
        A file for https://ui.perfetto.dev with every phase of every request.
    json
        Print one JSON object for each request.
    """
    paths, is_cut, meter = _read(log)
    budgets = budget_report(meter, paths)
    if request_id is not None:
        paths = [path for path in paths if path.request_id == request_id]
        if not paths:
            cause = f"no request {request_id} ended in this log"
            raise Failure(cause, "leave the id out, and choose one of those listed", str(log))
    if perfetto is not None:
        with naming_file(perfetto):
            perfetto.write_bytes(msgspec.json.encode(list(perfetto_events(paths))))
    if json:
        for path in paths:
            print(msgspec.json.encode(_object(path, meter)).decode())
        return 0
    console = Console(highlight=False, soft_wrap=True)
    if is_cut:
        console.print("the log ends before its graph did")
    if request_id is None:
        _show_all(console, paths, slowest)
        _show_budgets(console, [budget_row(one) for one in budgets])
    else:
        for path in paths:
            _show_path(console, path)
            _show_budgets(console, [share_row(one) for one in meter.divide(path)])
    return 0


def _read(log: Path) -> tuple[list[RequestPath], bool, BudgetMeter]:
    """The paths of a log, whether the log ends before its graph did, and a meter of the budgets of
    its graph. Raises Failure.
    """
    try:
        with log.open("rb") as file:
            reader = DecisionReader(file)
            paths = list(request_paths(reader))
            meter = BudgetMeter(from_msgpack(reader.header.graph), RESOLVER.vocabulary)
            return paths, reader.is_cut, meter
    except OSError as error:
        raise Failure(f"{error.strerror}", _FIX, str(log)) from None
    except LogError as error:
        raise Failure(str(error), _FIX, str(log)) from None


def _object(path: RequestPath, meter: BudgetMeter) -> dict[str, Any]:
    phases = [{**phase._asdict(), "seconds": phase.seconds} for phase in path.phases]
    return {
        **asdict(path),
        "phases": phases,
        "e2e_s": path.e2e_s,
        "ttft_s": path.ttft_s,
        "ttft_slack_s": path.ttft_slack_s,
        "budgets": [{**one._asdict(), "is_missed": one.is_missed} for one in meter.divide(path)],
    }


def _show_budgets(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table of budgets, if any request has an objective."""
    if rows:
        table = Table(*COLUMNS)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _show_path(console: Console, path: RequestPath) -> None:
    """Print each phase of one request, with its share of the whole time."""
    console.print(f"{path.request_id}, choice {path.choice}: {_headline(path)}", markup=False)
    table = Table("phase", "where", "from s", "ms", "share")
    for phase in path.phases:
        share = phase.seconds / path.e2e_s if path.e2e_s else 0.0
        begin = f"{phase.begin_s - path.arrived_s:.4f}"
        table.add_row(phase.name, phase.where, begin, f"{phase.seconds * 1e3:.1f}", f"{share:.1%}")
    console.print(table)


def _headline(path: RequestPath) -> str:
    parts = [f"{path.end} after {path.e2e_s * 1e3:.1f} ms"]
    parts.append(f"{path.num_prompt_tokens} tokens in, {path.num_tokens} out")
    if path.ttft_s is not None:
        parts.append(f"TTFT {path.ttft_s * 1e3:.1f} ms")
    if path.num_preempted:
        parts.append(f"preempted {path.num_preempted} times")
    slack_s = path.ttft_slack_s
    if slack_s is not None:
        parts.append(f"{'in time' if slack_s >= 0 else 'late'} by {abs(slack_s) * 1e3:.1f} ms")
    return ", ".join(parts)


def _show_all(console: Console, paths: Sequence[RequestPath], slowest: int) -> None:
    """Print the phases of all requests, which phase made requests late, and the slowest."""
    console.print(f"{len(paths)} requests ended")
    table = Table("phase", "mean ms", "p50", "p99", "share of all time")
    whole_s = sum(path.e2e_s for path in paths)
    by_phase = _by_phase(path.totals() for path in paths)
    for name in sorted(by_phase, key=PHASES.index):
        seconds = by_phase[name]
        ordered = sorted(one * 1e3 for one in seconds)
        share = sum(seconds) / whole_s if whole_s else 0.0
        figures = fmean(ordered), percentile(ordered, 0.5), percentile(ordered, 0.99)
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), f"{share:.1%}")
    console.print(table)
    late = [path for path in paths if path.ttft_slack_s is not None and path.ttft_slack_s < 0]
    if late:
        longest = _by_phase({_longest(path): 1.0} for path in late)
        reasons = ", ".join(f"{len(each)} mostly in {name}" for name, each in longest.items())
        console.print(f"{len(late)} missed their objective: {reasons}")
    for path in sorted(paths, key=lambda one: -one.e2e_s)[:slowest]:
        console.print(f"{path.request_id}: {_headline(path)}", markup=False)


def _longest(path: RequestPath) -> str:
    """The phase that took most of the time to the first token."""
    before = path.before_first_token()
    return max(before, key=lambda name: before[name]) if before else "no phase"


def _by_phase(totals: Iterable[dict[str, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for total in totals:
        for name, seconds in total.items():
            found.setdefault(name, []).append(seconds)
    return found
