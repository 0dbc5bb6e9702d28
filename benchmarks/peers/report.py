"""The figures of the peers as a record to keep, and as a table to read."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from benchmarks.cells import Cell
from benchmarks.peers.engines import OURS
from benchmarks.peers.rounds import Found
from benchmarks.peers.timing import LOWER_IS_BETTER, UNITS, ratio


def cell_record(
    cell: Cell, model: str, row: str, found: Found, failed: Mapping[str, str], limit: float | None
) -> dict[str, Any]:
    """One cell: medians, ratios, and reasons for missing figures.

    A ratio above 1 means that sagellm is better; None means that a figure is missing.
    """
    medians = {
        name: rounded(median(one.value for one in figures))
        for name, figures in found.figures.items()
    }
    ours = medians.pop(OURS, None)
    best = best_of(cell.kind, medians)
    kept = {
        "cell": cell.name,
        "model": model,
        "row": row,
        "unit": UNITS[cell.kind],
        "better": "lower" if cell.kind in LOWER_IS_BETTER else "higher",
        "ours": ours,
        "peers": medians,
        "best_peer": best,
        "ratio_to_best_peer": _ratio(cell.kind, ours, medians.get(best or "")),
        "limit": None if limit is None else rounded(limit),
        "ratio_to_limit": _ratio(cell.kind, ours, limit),
        "rounds": {
            name: [rounded(one.value) for one in figures] for name, figures in found.figures.items()
        },
        "extrapolated_from_tokens": _cut(found),
        "missing": dict(failed),
        "bandwidth_gb_per_s": [round(one / 1e9, 1) for one in found.bandwidths],
        "moved_rounds": [number + 1 for number in found.moved],
    }
    if found.beside:
        kept["beside_spinning"] = _beside(cell.kind, found, best)
    return kept


def _beside(kind: str, found: Found, best: str | None) -> dict[str, Any]:
    """The figures beside spinning processes, and their shares of those alone.

    A share is the median of the rounds' shares: both figures of a round saw the same machine.
    `relative_to_best_peer`: the share of sagellm over that of the peer that is best alone. Below 1,
    sagellm falls further.
    """
    shares = {
        name: median(
            ratio(kind, one.value, alone.value)
            for one, alone in zip(figures, found.figures[name], strict=False)
        )
        for name, figures in found.beside.items()
    }
    ours, theirs = shares.get(OURS), shares.get(best or "")
    return {
        "figures": {
            name: rounded(median(one.value for one in figures))
            for name, figures in found.beside.items()
        },
        "share_of_alone": {name: round(share, 3) for name, share in shares.items()},
        "relative_to_best_peer": round(ours / theirs, 3) if ours and theirs else None,
        "rounds": {
            name: [rounded(one.value) for one in figures] for name, figures in found.beside.items()
        },
    }


def best_of(kind: str, medians: Mapping[str, float]) -> str | None:
    """The name of the peer with the best figure."""
    choose = min if kind in LOWER_IS_BETTER else max
    return choose(medians, key=lambda name: medians[name], default=None)


def rounded(value: float) -> float:
    """The value with four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _ratio(kind: str, ours: float | None, other: float | None) -> float | None:
    return round(ratio(kind, ours, other), 3) if ours and other else None


def _cut(found: Found) -> dict[str, int]:
    """For each engine with rounds that were cut short, the fewest tokens a sequence."""
    cuts = {
        name: [one.extrapolated_from for one in figures if one.extrapolated_from is not None]
        for name, figures in found.figures.items()
    }
    return {name: min(of_one) for name, of_one in cuts.items() if of_one}


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown: a table for each model, and the reasons for missing figures."""
    machine, peers = record["machine"], record["peers"]
    lines = [
        f"# Peers on {machine['cpu']}",
        "",
        f"{record['date']}, `{record['command']}`: {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['capability']}. Random weights, greedy, fixed "
        "lengths; medians of interleaved rounds. Ratios above 1: sagellm is better. Only ratios "
        "within one run mean anything. Bold: the best peer. OpenVINO's row bf16 has weights in "
        "fp16 and its own choice of what it computes and caches in: compare the logit errors.",
    ]
    for model in dict.fromkeys(cell["model"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["model"] == model]
        lines += ["", f"## {model}", "", *_rows(cells, peers)]
        lines += _beside_rows(cells, peers, record.get("spinning", 0))
    lines += _notes(record["cells"])
    return "\n".join(lines) + "\n"


def _rows(cells: Iterable[dict[str, Any]], peers: Iterable[str]) -> list[str]:
    heads = ["row", "cell", "unit", OURS, *peers, "ratio to best peer", "limit", "share of limit"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell in cells:
        shown = [_shown(cell, name) for name in (OURS, *peers)]
        ratios = [_number(cell[name]) for name in ("ratio_to_best_peer", "limit", "ratio_to_limit")]
        named = cell["cell"] + (" (moved)" if cell["moved_rounds"] else "")
        lines.append(f"| {' | '.join([cell['row'], named, cell['unit'], *shown, *ratios])} |")
    return lines


def _beside_rows(cells: Iterable[dict[str, Any]], peers: Iterable[str], spinning: int) -> list[str]:
    """The table of the cells that were also measured beside spinning processes, if there are any.

    A peer is the best peer if its figure alone is.
    """
    shown = [cell for cell in cells if "beside_spinning" in cell]
    if not shown:
        return []
    heads = ["row", "cell", "unit", OURS, *peers, "share / best peer's", "sagellm falls further"]
    lines = ["", f"Beside {spinning} spinning processes (share of the figure alone):", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for cell in shown:
        beside = cell["beside_spinning"]
        figures = [_beside_shown(cell, name) for name in (OURS, *peers)]
        relative = beside["relative_to_best_peer"]
        falls = "" if relative is None else "yes" if relative < 1 else "no"
        named = [cell["row"], cell["cell"], cell["unit"]]
        lines.append(f"| {' | '.join([*named, *figures, _number(relative), falls])} |")
    return lines


def _beside_shown(cell: dict[str, Any], name: str) -> str:
    beside = cell["beside_spinning"]
    if name not in beside["figures"]:
        return _shown(cell, name) if name in cell["missing"] else ""
    value = f"{beside['figures'][name]:g}"
    mark = f"**{value}**" if name == cell["best_peer"] else value
    return f"{mark} ({beside['share_of_alone'][name]:g})"


def _shown(cell: dict[str, Any], name: str) -> str:
    if name in cell["missing"]:
        built = "not built" if "NotBuilt" in cell["missing"][name] else "-"
        return built
    value = cell["ours"] if name == OURS else cell["peers"].get(name)
    if value is None:
        return ""
    mark = "\\*" if name in cell["extrapolated_from_tokens"] else ""
    return f"**{value:g}**{mark}" if name == cell["best_peer"] else f"{value:g}{mark}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _memory_note(cell: dict[str, Any]) -> str:
    """The peak memory of sagellm as a multiple of the least that any engine needs."""
    times = cell["ours"] / cell["limit"]
    return (
        f"{cell['model']} {cell['row']} {cell['cell']}: {OURS} takes {times:.2f}x of weights + KV "
        f"({cell['limit']:g} GB, the limit)."
    )


def _notes(cells: Iterable[dict[str, Any]]) -> list[str]:
    """The legend of the marks, and each reason once."""
    cells = list(cells)
    lines = []
    if any(cell["extrapolated_from_tokens"] for cell in cells):
        lines += ["", "\\* cut short, and extrapolated from the tokens that were measured."]
    lines += [
        line
        for cell in cells
        if cell["unit"] == UNITS["memory"] and cell["ratio_to_limit"]
        for line in ("", _memory_note(cell))
    ]
    if any(cell["moved_rounds"] for cell in cells):
        lines += ["", "(moved): the machine's bandwidth moved by more than 10 % in a round, twice."]
    reasons = {
        f"- {name}, {cell['model']} {cell['row']}: {why}"
        for cell in cells
        for name, why in cell["missing"].items()
    }
    reasons |= {
        f"- {cell['model']} {cell['cell']}: {cell['left_out']}"
        for cell in cells
        if "left_out" in cell
    }
    return [*lines, "", "Missing:", "", *sorted(reasons)] if reasons else lines
