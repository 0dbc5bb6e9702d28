"""Prints what shadows would have decided otherwise, for `sagellm replay`."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from sagellm.experiments.disagreements import Difference, NodeReport, ShadowReport, shown_gain
from sagellm.runtime.core.experiments import ExperimentTally


def show_shadows(report: ShadowReport, most: int) -> None:
    """Print a table of the disagreements, and the `most` weighty of each operator and label."""
    console = Console(highlight=False, soft_wrap=True)
    if report.is_cut:
        console.print("the log ends before its graph did")
    for target in report.unplayed:
        console.print(f"{target} decides nothing in the log: it is only simulated", markup=False)
    if not report.nodes:
        return
    table = Table("operator", "decisions", "the shadow", "times", "predicted", "cached", "became")
    for node in report.nodes:
        for number, tally in enumerate(node.tallies or (None,)):
            name, count = (node.node, str(node.num_decisions)) if not number else ("", "")
            table.add_row(name, count, *_cells(node, tally, report.differences))
    console.print(table)
    for node in report.nodes:
        if node.fault:
            console.print(f"{node.node}: its shadow was switched off by {node.fault}", markup=False)
        if node.is_blind:
            text = "its shadow reads prefix blocks, and the log has no reports of them"
            console.print(f"{node.node}: {text}", markup=False)
        for tally in node.tallies:
            found = sorted(_of(report.differences, tally), key=lambda one: -one.weight_s)
            for one in found[:most]:
                console.print(_line(one), markup=False)


def _of(differences: Sequence[Difference], tally: ExperimentTally) -> list[Difference]:
    label = tally.node, tally.label
    return [one for one in differences if (one.node, one.note.label) == label]


def _cells(
    node: NodeReport, tally: ExperimentTally | None, differences: Sequence[Difference]
) -> Iterable[str]:
    if tally is None:
        return ("agrees" if node.num_decisions else "", "", "", "", "")
    share = tally.num_notes / node.num_decisions if node.num_decisions else 0.0
    gain = ""
    if tally.num_predicted:
        gain = f"TTFT {shown_gain(tally.gain_s / tally.num_predicted)}"
    became = [f"{number} {outcome}" for outcome, number in tally.outcomes.items()]
    waited = [one.waited_s for one in _of(differences, tally) if one.waited_s is not None]
    if waited:
        became.append(f"waited {fmean(waited) * 1e3:.0f} ms more")
    tokens = f"{tally.gain_tokens:+d}" if tally.gain_tokens else ""
    times = f"{tally.num_notes} ({share:.1%})"
    return (tally.label, times, gain, tokens, ", ".join(became))


def _line(one: Difference) -> str:
    note = one.note
    choice = f"/{note.choice}" if note.choice else ""
    decided = f"{note.live}, not {note.shadow}"
    return f"{one.at_s:.6f} s: {one.node}: {note.request_id}{choice} {decided}: {one.known}"


def shadow_object(report: ShadowReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "shadows": [_node_object(node) for node in report.nodes],
        "differences": [difference_object(one) for one in report.differences],
    }


def _node_object(node: NodeReport) -> dict[str, Any]:
    return {
        "operator": node.node,
        "kind": node.kind,
        "decisions": node.num_decisions,
        "fault": node.fault or None,
        "reads_missing_prefixes": node.is_blind,
        "disagreements": [
            {
                "label": one.label,
                "number": one.num_notes,
                "predicted": one.num_predicted,
                "gain_s": one.gain_s,
                "gain_cached_tokens": one.gain_tokens,
                "outcomes": one.outcomes,
            }
            for one in node.tallies
        ],
    }


def difference_object(one: Difference) -> dict[str, Any]:
    """One difference as plain data."""
    path = one.path
    outcome = None
    if path is not None:
        outcome = {"end": path.end, "ttft_s": path.ttft_s, "ttft_slack_s": path.ttft_slack_s}
    return {
        "at_s": one.at_s,
        "operator": one.node,
        **msgspec.structs.asdict(one.note),
        "waited_s": one.waited_s,
        "outcome": outcome,
    }
