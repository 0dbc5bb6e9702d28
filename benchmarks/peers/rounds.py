"""Rounds of one cell with the engines in turns; a round on an unsteady machine is repeated."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cells import Cell
from benchmarks.peers.engines import OURS
from benchmarks.peers.group import Group
from benchmarks.peers.plan import START
from benchmarks.peers.timing import UNITS, Figure

STILL = 0.1  # a round with a larger change of the memory bandwidth is repeated, once
Figures = dict[str, list[Figure]]


@dataclass(slots=True)
class Found:
    """The figures of one cell. `moved`: rounds in which the bandwidth changed too much."""

    figures: Figures
    bandwidths: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)


class Rounds:
    """`bandwidth` measures bytes a second. Each peer stops after `spend_s` seconds of a cell."""

    def __init__(self, bandwidth: Callable[[], float], num_rounds: int, spend_s: float) -> None:
        self._bandwidth = bandwidth
        self._num_rounds = num_rounds
        self._spend_s = spend_s

    def measure(self, group: Group, cell: Cell) -> Found:
        """Run all rounds of one cell. An engine that fails has no figures in it."""
        found = Found({name: [] for name in group.names})
        spent_s = dict.fromkeys(group.names, 0.0)
        for number in range(self._num_rounds):
            figures, has_moved = self._round(group, cell, 2 * number, spent_s, found)
            if has_moved:
                print(f"{cell.name} round {number + 1}: the machine moved; again", file=sys.stderr)
                again, has_moved = self._round(group, cell, 2 * number + 1, spent_s, found)
                figures |= again
            if has_moved:
                found.moved.append(number)
            for name, one in figures.items():
                found.figures[name].append(one)
        found.figures = {name: figures for name, figures in found.figures.items() if figures}
        return found

    def _round(
        self, group: Group, cell: Cell, number: int, spent_s: dict[str, float], found: Found
    ) -> tuple[dict[str, Figure], bool]:
        """One turn of each engine with time left; and whether the bandwidth changed too much."""
        before = self._bandwidth()
        figures: dict[str, Figure] = {}
        for name in group.names:
            if name == OURS or number == 0 or spent_s[name] < self._spend_s:
                started = time.perf_counter()
                with group.noting(name):
                    figures[name] = self._once(group, cell, name, number)
                    _tell(cell, name, figures[name])
                spent_s[name] += time.perf_counter() - started
        after = self._bandwidth()
        found.bandwidths += [before, after]
        return figures, abs(after - before) > STILL * max(before, after)

    def _once(self, group: Group, cell: Cell, name: str, number: int) -> Figure:
        if cell is START:
            return group.start(name)
        return group.run(name, cell, number, 0.0 if name == OURS else self._spend_s)


def _tell(cell: Cell, name: str, one: Figure) -> None:
    print(f"{cell.name} {name}: {one.value:.4g} {UNITS[cell.kind]}", file=sys.stderr)
