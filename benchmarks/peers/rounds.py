"""Rounds of one cell with the engines in turns; a round on an unsteady machine is repeated."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cells import Cell
from benchmarks.machine import SPEEDS
from benchmarks.peers.engines import OURS
from benchmarks.peers.group import Group
from benchmarks.peers.plan import START
from benchmarks.peers.spinning import Spinning
from benchmarks.peers.timing import UNITS, Figure

STILL = 0.1  # a round with a larger change of the memory bandwidth is repeated, once
Figures = dict[str, list[Figure]]


@dataclass(slots=True)
class Found:
    """The figures of one cell. `moved`: rounds in which the bandwidth changed too much.

    `beside`: figures of the same rounds beside the spinning processes; `spent_s`: the seconds that
    each engine took.
    """

    figures: Figures
    bandwidths: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    beside: Figures = field(default_factory=dict)
    spent_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Round:
    """A turn of each engine, alone and beside the spinning processes."""

    alone: dict[str, Figure]
    beside: dict[str, Figure]
    has_moved: bool

    def __or__(self, again: "_Round") -> "_Round":
        """This round with the figures of its repetition in place of its own."""
        return _Round(self.alone | again.alone, self.beside | again.beside, again.has_moved)


class Rounds:
    """`bandwidth` measures bytes a second. Each peer stops after `spend_s` seconds of a cell.

    A cell of speed is measured alone and then, if `spinning` is not 0, beside that many processes
    that spin: both in each round.
    """

    def __init__(
        self, bandwidth: Callable[[], float], num_rounds: int, spend_s: float, spinning: int = 0
    ) -> None:
        self._bandwidth = bandwidth
        self._num_rounds = num_rounds
        self._spend_s = spend_s
        self._spinning = spinning

    def measure(self, group: Group, cell: Cell) -> Found:
        """Run all rounds of one cell. An engine that fails has no figures in it."""
        found = Found({}, spent_s=dict.fromkeys(group.names, 0.0))
        for number in range(self._num_rounds):
            one = self._round(group, cell, 2 * number, found)
            if one.has_moved:
                print(f"{cell.name} round {number + 1}: the machine moved; again", file=sys.stderr)
                one |= self._round(group, cell, 2 * number + 1, found)
            if one.has_moved:
                found.moved.append(number)
            for kept, figures in ((found.figures, one.alone), (found.beside, one.beside)):
                for name, figure in figures.items():
                    kept.setdefault(name, []).append(figure)
        return found

    def _round(self, group: Group, cell: Cell, number: int, found: Found) -> _Round:
        """One turn of each engine with time left."""
        before = self._bandwidth()
        names = [name for name in group.names if number == 0 or self._has_time(name, found)]
        alone = self._turns(group, cell, names, 2 * number, found.spent_s)
        beside: dict[str, Figure] = {}
        if self._spinning and cell.kind in SPEEDS:
            with Spinning(self._spinning):
                print(f"beside {self._spinning} spinning processes:", file=sys.stderr)
                beside = self._turns(group, cell, list(alone), 2 * number + 1, found.spent_s)
        after = self._bandwidth()
        found.bandwidths += [before, after]
        return _Round(alone, beside, abs(after - before) > STILL * max(before, after))

    def _has_time(self, name: str, found: Found) -> bool:
        return name == OURS or found.spent_s[name] < self._spend_s

    def _turns(
        self, group: Group, cell: Cell, names: list[str], number: int, spent_s: dict[str, float]
    ) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        for name in names:
            started = time.perf_counter()
            with group.noting(name):
                figures[name] = self._once(group, cell, name, number)
                _tell(cell, name, figures[name])
            spent_s[name] += time.perf_counter() - started
        return figures

    def _once(self, group: Group, cell: Cell, name: str, number: int) -> Figure:
        if cell is START:
            return group.start(name)
        return group.run(name, cell, number, 0.0 if name == OURS else self._spend_s)


def _tell(cell: Cell, name: str, one: Figure) -> None:
    print(f"{cell.name} {name}: {one.value:.4g} {UNITS[cell.kind]}", file=sys.stderr)
