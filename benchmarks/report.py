"""The results as JSON to keep, and as a table to read."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cells import Cell, Run, rate
from benchmarks.machine import Limits

Runs = dict[str, list[Run]]  # engine name -> its runs of one cell


def measured(cell: Cell, runs: Runs, limits: Limits) -> dict[str, Any]:
    """One cell: the rates of each engine, their median, and ratios to the peer and to the limit."""
    engines = {name: _engine(cell, of_engine) for name, of_engine in runs.items()}
    limit = limits.of(cell)
    found: dict[str, Any] = {
        "cell": cell.name,
        "unit": f"{cell.kind} tokens/s",
        "engines": engines,
        "limit": None if limit is None else round(limit, 1),
    }
    ours = engines["sagellm"]["median"]
    if limit is not None:
        found["share_of_limit"] = round(ours / limit, 3)
    if "transformers" in engines:
        found["ratio_to_transformers"] = round(ours / engines["transformers"]["median"], 2)
    return found


def _engine(cell: Cell, runs: list[Run]) -> dict[str, Any]:
    rates = [round(rate(cell, run), 2) for run in runs]
    fewest = min(run.num_measured for run in runs)
    found: dict[str, Any] = {"median": median(rates), "rounds": len(runs), "rates": rates}
    if fewest < cell.num_out:
        found["extrapolated_from_tokens"] = fewest
    return found


def table(record: dict[str, Any]) -> str:
    """The record as tables in Markdown."""
    limits, machine = record["limits"], record["machine"]
    lines = [
        f"# Engine on {machine['cpu']}",
        "",
        f"{record['date']}, `{record['command']}`: {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['capability']}, torch {machine['torch']}. "
        "Random weights in the shape of Qwen2.5-0.5B, bfloat16, greedy. Medians of interleaved "
        "rounds, tokens/s. Only ratios within one run mean anything.",
        "",
        f"Limits: memory read {limits['read_gb_per_s']} GB/s, matmul "
        f"{limits['fp32_gflops']} GFLOP/s in fp32 and {limits['bf16_gflops']} in bf16.",
        "",
        "| cell | sagellm | transformers | ratio | limit | share of limit | rounds |",
        "|---|---|---|---|---|---|---|",
        *(_row(cell) for cell in record["cells"]),
    ]
    if any(_is_cut(cell) for cell in record["cells"]):
        lines += ["", "* cut short, and extrapolated from the steps that were measured."]
    if "overhead" in record:
        lines += _overhead(record["overhead"])
    return "\n".join(lines) + "\n"


def _overhead(found: list[dict[str, Any]]) -> list[str]:
    """A table of steps, their programs, and the share outside the program, a row a shape."""
    heads = "| model | sequences | step, ms | its program, ms | share outside |"
    names = ("model", "batch", "step_ms", "program_ms", "share_outside")
    rows = [f"| {' | '.join(str(one[name]) for name in names)} |" for one in found]
    return [
        "",
        "A decode step, and what of it is outside the kernels:",
        "",
        heads,
        "|---" * 5 + "|",
        *rows,
    ]


def _row(cell: dict[str, Any]) -> str:
    engines = cell["engines"]
    shown = [_median(engines.get(name)) for name in ("sagellm", "transformers")]
    rounds = " / ".join(str(engine["rounds"]) for engine in engines.values())
    ratio, limit, share = (
        _number(cell.get(key)) for key in ("ratio_to_transformers", "limit", "share_of_limit")
    )
    return f"| {' | '.join([cell['cell'], *shown, ratio, limit, share, rounds])} |"


def _median(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "-"
    return f"{engine['median']:.1f}{'*' if 'extrapolated_from_tokens' in engine else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _is_cut(cell: dict[str, Any]) -> bool:
    return any("extrapolated_from_tokens" in engine for engine in cell["engines"].values())


def write(record: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Write NAME.json and NAME.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_table = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(record, indent=2) + "\n")
    as_table.write_text(table(record))
    return as_json, as_table
