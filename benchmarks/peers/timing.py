"""Converts the times of tokens to the figure of a cell."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cells import Cell

Times = Sequence[Sequence[float]]  # for each sequence, the seconds at which each token was there

UNITS = {
    "prefill": "prompt tokens/s",
    "ttft": "ms",
    "decode": "tokens/s",
    "batch": "output tokens/s",
    "start": "s",
    "memory": "GB",
    "error": "of the deviation of fp32's",
}
LOWER_IS_BETTER = frozenset({"ttft", "start", "memory", "error"})


@dataclass(frozen=True, slots=True)
class Figure:
    """A value in the unit of its cell; it may stem from fewer tokens than the cell asks for."""

    value: float
    extrapolated_from: int | None = None


def figure(cell: Cell, times: Times) -> Figure:
    """The figure of a cell from its times. Raises ValueError if times are missing."""
    if not times or not all(times):
        raise ValueError("a sequence has no token")
    first_s = min(of_one[0] for of_one in times)
    if cell.kind == "prefill":
        return Figure(cell.num_sequences * cell.prompt_len / first_s)
    if cell.kind == "ttft":
        return Figure(1e3 * first_s)
    fewest = min(map(len, times))
    cut = fewest if fewest < cell.num_out else None
    if cell.kind == "decode":
        return Figure(_together(times), cut)
    num_tokens = cell.num_sequences * cell.num_out
    return Figure(num_tokens / _whole(times, num_tokens), cut)


def _together(times: Times) -> float:
    """Tokens a second from the last sequence's first token to the first sequence's last token."""
    start, end = max(of_one[0] for of_one in times), min(of_one[-1] for of_one in times)
    if end <= start:
        raise ValueError("the sequences were never decoded together")
    return sum(start < one <= end for of_one in times for one in of_one) / (end - start)


def _whole(times: Times, num_tokens: int) -> float:
    """Seconds for all tokens. Missing tokens take as long as those of the last half."""
    seen = sorted(one for of_one in times for one in of_one)
    missing = num_tokens - len(seen)
    if missing <= 0:
        return seen[-1]
    middle = len(seen) // 2
    return seen[-1] + missing * (seen[-1] - seen[middle]) / (len(seen) - 1 - middle)


def error(found: Sequence[float], exact: Sequence[float]) -> float:
    """Root mean square of the differences, divided by the standard deviation of `exact`.

    Raises ValueError if the lengths differ.
    """
    square = sum((one - other) ** 2 for one, other in zip(found, exact, strict=True))
    mean = sum(exact) / len(exact)
    deviation = sum((one - mean) ** 2 for one in exact)
    return float((square / deviation) ** 0.5)


def ratio(kind: str, ours: float, other: float) -> float:
    """How many times better than `other` a value is: above 1, sagellm is better."""
    return other / ours if kind in LOWER_IS_BETTER else ours / other
