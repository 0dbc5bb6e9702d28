"""Plots the latencies of a load. Needs the extra `plot`, so this module is imported on demand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sagellm.errors import naming_file
from sagellm.load import RequestRecord
from sagellm.load.report import Objective

_SIZE_INCHES, _DPI = (12.0, 4.0), 120


def plot_cdf(path: Path, records: Sequence[RequestRecord], objective: Objective | None) -> None:
    """Write the cumulative distributions of TTFT, ITL and end-to-end time of served requests.

    `path` names a file whose suffix matplotlib knows. Raises OSError that names the file.
    """
    served = [record for record in records if record.is_ok]  # as in the summary
    wanted = objective or Objective()
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    ttft, itl, e2e = figure.subplots(1, 3, sharey=True)
    _curve(ttft, "TTFT", (record.ttft_s for record in served), wanted.ttft_s)
    _curve(itl, "ITL", (itl_s for record in served for itl_s in record.itl_s), wanted.itl_s)
    _curve(e2e, "end to end", (record.e2e_s for record in served), None)
    ttft.set_ylabel("share of all")
    figure.suptitle(f"{len(served)} of {len(records)} requests served")
    with naming_file(path):
        figure.savefig(path, dpi=_DPI)


def _curve(axes: Axes, title: str, values: Iterable[float | None], bound_s: float | None) -> None:
    """Draw one cumulative distribution in ms, with a dashed line at the objective's bound."""
    ordered_ms = sorted(value * 1e3 for value in values if value is not None)
    shares = [rank / len(ordered_ms) for rank in range(1, len(ordered_ms) + 1)]
    axes.step(ordered_ms, shares, where="post")
    axes.set(title=title, xlabel="ms", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if bound_s is not None:
        axes.axvline(bound_s * 1e3, linestyle="--", color="tab:red")
