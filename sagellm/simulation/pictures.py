"""Plots of simulations. Needs the extra `plot`, so this module is imported on demand."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sagellm.errors import naming_file
from sagellm.load.report import Objective
from sagellm.simulation.figures import SimulationSummary
from sagellm.simulation.simulation_run import SimulatedRequest

_SIZE_INCHES, _DPI = (13.0, 9.0), 110
PICTURES = tuple(FigureCanvasAgg.filetypes)  # the suffixes that a file may have
_MOST_BARS = 60  # requests in the Gantt chart
_COLOURS = {
    "queue_s": "tab:gray",
    "prefill_s": "tab:orange",
    "transfer_s": "tab:red",
    "decode_s": "tab:blue",
}


def plot_run(path: Path, requests: Sequence[SimulatedRequest], objective: Objective | None) -> None:
    """Draw the distributions of TTFT and TPOT, the requests under way over time, and a Gantt chart
    of the first requests. Raises OSError that names the file.
    """
    served = [request for request in requests if request.is_ok]
    wanted = objective or Objective()
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    (ttft, tpot), (timeline, gantt) = figure.subplots(2, 2)
    _distribution(ttft, "TTFT", (one.ttft_s for one in served), wanted.ttft_s)
    _distribution(tpot, "TPOT", (one.tpot_s for one in served), wanted.itl_s)
    _timeline(timeline, served)
    _gantt(gantt, served[:_MOST_BARS])
    figure.suptitle(f"{len(served)} of {len(requests)} requests served")
    _save(figure, path)


def _distribution(
    axes: Axes, title: str, values: Iterable[float | None], bound_s: float | None
) -> None:
    ordered_ms = sorted(value * 1e3 for value in values if value is not None)
    shares = [rank / len(ordered_ms) for rank in range(1, len(ordered_ms) + 1)]
    axes.step(ordered_ms, shares, where="post")
    axes.set(title=title, xlabel="ms", ylabel="share of all", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if bound_s is not None:
        axes.axvline(bound_s * 1e3, linestyle="--", color="tab:red")


def _timeline(axes: Axes, served: Sequence[SimulatedRequest]) -> None:
    """The numbers of requests that wait, and that engines compute, over time."""
    waiting: list[tuple[float, int]] = []
    running: list[tuple[float, int]] = []
    for one in served:
        started_s = one.arrived_s + one.phases.queue_s
        waiting += [(one.arrived_s, 1), (started_s, -1)]
        running += [(started_s, 1), (one.ended_s, -1)]
    for label, changes in (("waiting", waiting), ("running", running)):
        times, numbers, number = [], [], 0
        for at_s, change in sorted(changes, key=lambda one: (one[0], -one[1])):
            number += change
            times.append(at_s)
            numbers.append(number)
        axes.step(times, numbers, where="post", label=label)
    axes.set(title="requests under way", xlabel="s")
    axes.legend()
    axes.grid(alpha=0.3)


def _gantt(axes: Axes, served: Sequence[SimulatedRequest]) -> None:
    """One bar for each request, in the colours of its phases."""
    for row, one in enumerate(served):
        begin_s = one.arrived_s
        for name, colour in _COLOURS.items():
            seconds = getattr(one.phases, name)
            if seconds > 0:
                axes.barh(row, seconds, left=begin_s, color=colour, height=0.8)
            begin_s += seconds
    for name, colour in _COLOURS.items():
        axes.barh(0, 0, color=colour, label=name.removesuffix("_s"))
    axes.set(title=f"phases of the first {len(served)} requests", xlabel="s", ylabel="request")
    axes.legend()


def plot_sweep(
    path: Path, values: Sequence[dict[str, Any]], summaries: Sequence[SimulationSummary]
) -> None:
    """Draw goodput (or throughput) and the p99 of TTFT against the first axis of a sweep, with a
    line for each combination of the others. Raises OSError that names the file.
    """
    axis, *others = values[0]
    figure = Figure(figsize=(13.0, 5.0), layout="constrained")
    goodput, ttft = figure.subplots(1, 2)
    lines: dict[str, list[tuple[Any, SimulationSummary]]] = {}
    for chosen, summary in zip(values, summaries, strict=True):
        label = ", ".join(f"{name}={chosen[name]}" for name in others)
        lines.setdefault(label, []).append((chosen[axis], summary))
    for label, points in lines.items():
        places = [place for place, _ in points]
        good = [_rate(one) for _, one in points]
        goodput.plot(places, good, marker="o", label=label or None)
        late = [one.ttft_ms.p99 if one.ttft_ms else 0.0 for _, one in points]
        ttft.plot(places, late, marker="o", label=label or None)
    has_goodput = summaries[0].goodput_rps is not None
    goodput.set(title="goodput" if has_goodput else "throughput", xlabel=axis, ylabel="requests/s")
    ttft.set(title="TTFT, p99", xlabel=axis, ylabel="ms")
    for axes in (goodput, ttft):
        axes.grid(alpha=0.3)
        if others:
            axes.legend()
    _save(figure, path)


def _rate(summary: SimulationSummary) -> float:
    return summary.requests_per_s if summary.goodput_rps is None else summary.goodput_rps


def _save(figure: Figure, path: Path) -> None:
    with naming_file(path):
        figure.savefig(path, dpi=_DPI)
