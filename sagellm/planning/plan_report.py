"""How a plan is shown: a table, and JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sagellm.graphs.text.yaml import dump
from sagellm.planning.plan_task import PlanTask
from sagellm.planning.search import Candidate, Certainty, PlanResult

_SHOWN_MISFITS = 8


def show_plan(console: Console, task: PlanTask, found: PlanResult, top: int, command: str) -> None:
    """Print the placement, its cost and how sure it is, `top` others, and what was left out."""
    workload, profile = task.workload, task.profile
    span_s = workload[-1].at_s - workload[0].at_s
    rate = f", {(len(workload) - 1) / span_s:.2f} requests/s" if span_s > 0 else ""
    lines = [
        ("model", f"{task.model} on {profile.name} ({profile.method} profile)"),
        ("level", str(task.level)),
        ("trace", f"{len(workload)} requests in {span_s:.1f} s{rate}"),
        ("placement", found.winner.placement.name if found.winner else "none meets the level"),
    ]
    if found.winner is not None:
        lines.append(("cost", _cost(task, found.winner)))
        lines.append(("certainty", _certainty(task, found.winner, found.certainty)))
    for label, text in lines:
        console.print(f"{label + ':':12}{text}", markup=False)
    first = found.winner or found.nearest
    shown = [] if first is None else [first, *_distinct(first, found.runners_up, top)]
    console.print(_table(task, found, shown))
    for line in _left_out(found):
        console.print(line, markup=False)
    if command:
        console.print(f"to simulate the placement: {command}", markup=False)


def _distinct(first: Candidate, others: Sequence[Candidate], top: int) -> list[Candidate]:
    """The first `top` of others, without those whose limits or policy change no figure."""
    found = {(first.placement.layout, msgspec.json.encode(first.summary)): first}
    for one in others:
        found.setdefault((one.placement.layout, msgspec.json.encode(one.summary)), one)
    return list(found.values())[1 : 1 + top]


def _cost(task: PlanTask, one: Candidate) -> str:
    each = one.summary.cost_per_1k_tokens or 0.0
    gpus = one.placement.num_gpus
    devices = f"{gpus} device{'s' if gpus > 1 else ''}"
    if task.price is None:
        return f"{devices}, {each:.4g} s of a device for 1,000 tokens"
    return f"{devices} at {task.price:g} an hour, {each:.4g} for 1,000 tokens"


def _certainty(task: PlanTask, one: Candidate, certainty: Certainty | None) -> str:
    room = f"the worst p99 is at {task.level.use(one.summary):.0%} of its bound"
    margin = f"{one.attained:.1%} attained, {one.attained - task.level.attainment:+.1%}"
    parts = [margin, room]
    if certainty is not None:
        total = len(certainty.attained)
        parts.append(
            f"{certainty.num_met} of {total} resampled traces meet the level "
            f"({certainty.mean:.1%} +- {certainty.deviation:.1%}, least "
            f"{min(certainty.attained):.1%})"
        )
    if task.profile.method != "measured":
        parts.append(f"the profile is a {task.profile.method}, not measured")
    return "; ".join(parts)


def _table(task: PlanTask, found: PlanResult, shown: Sequence[Candidate]) -> Table:
    money = "device-s" if task.price is None else "cost"
    latencies = "TTFT p50, ms", "p99", "TPOT p50, ms", "p99"
    names = ("placement", "devices", "attained", *latencies, "goodput")
    table = Table(*names, f"{money}/1k", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for one in shown:
        table.add_row(*_row(one.placement.name, one))
    for advice in found.advice:
        if advice.found is None:
            table.add_row(f"advised: {advice.layout}", advice.reason)
        else:
            table.add_row(*_row(f"advised: {advice.found.placement.name}", advice.found))
    return table


def _row(name: str, one: Candidate) -> Iterable[str]:
    summary = one.summary
    latencies = [
        f"{value:.1f}"
        for each in (summary.ttft_ms, summary.tpot_ms)
        for value in ((each.p50, each.p99) if each is not None else ())
    ] or [""] * 4
    attained = f"{one.attained:.1%}{'' if one.is_met else ' no'}"
    cost = f"{summary.cost_per_1k_tokens or 0.0:.4g}"
    latencies += [""] * (4 - len(latencies))
    goodput = f"{summary.goodput_rps or 0.0:.2f}"
    return name, str(one.placement.num_gpus), attained, *latencies, goodput, cost


def _left_out(found: PlanResult) -> Iterable[str]:
    """Why placements are not among those that were simulated."""
    for name, reason in list(found.misfits.items())[:_SHOWN_MISFITS]:
        yield f"left out: {name}: {reason}"
    more = len(found.misfits) - _SHOWN_MISFITS
    if more > 0:
        yield f"left out: {more} further groups of devices"
    for bound, number in found.pruned.items():
        yield f"left out: {number} placements cannot meet the level, whatever the schedule: {bound}"
    counts = f"{found.num_placements} placements, {found.num_simulations} simulations"
    yield f"searched: {counts}; {found.num_dearer} cannot be cheaper than the best"


def plan_fields(task: PlanTask, found: PlanResult, command: str) -> dict[str, Any]:
    """A result as JSON."""
    level = task.level
    certainty = found.certainty
    return {
        "is_met": found.winner is not None,
        "model": task.model,
        "profile": {"name": task.profile.name, "method": task.profile.method},
        "slo": {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s, "attainment": level.attainment},
        "cost_unit": "device_seconds" if task.price is None else "price",
        "winner": found.winner and _placed(task, found.winner, is_whole=True),
        "nearest": found.nearest and _placed(task, found.nearest, is_whole=True),
        "runners_up": [_placed(task, one) for one in found.runners_up],
        "advised": [
            {"layout": one.layout, "reason": one.reason}
            if one.found is None
            else {"layout": one.layout, **_placed(task, one.found)}
            for one in found.advice
        ],
        "certainty": certainty and {"attained": certainty.attained, "met": certainty.num_met},
        "misfits": found.misfits,
        "pruned": found.pruned,
        "searched": {
            "placements": found.num_placements,
            "simulations": found.num_simulations,
            "dearer": found.num_dearer,
        },
        "command": command,
    }


def _placed(task: PlanTask, one: Candidate, *, is_whole: bool = False) -> dict[str, Any]:
    """A placement with its figures; a whole one with its graph too."""
    summary = msgspec.to_builtins(one.summary)
    del summary["engines"]
    graph = {"graph": dump(task.graph(one.placement).ir)} if is_whole else {}
    return {
        "name": one.placement.name,
        "gpus": one.placement.num_gpus,
        "is_met": one.is_met,
        "figures": summary,
        **graph,
    }
