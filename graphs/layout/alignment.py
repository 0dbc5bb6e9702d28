"""Horizontal positions of the cells of a layered layout, with long edges made straight.

The algorithm is Brandes and Köpf, "Fast and simple horizontal coordinate assignment" (2001): it
computes four layouts, each aligned to one corner, and takes the mean of the two median positions of
each cell. Here, longest paths compact the blocks of each layout, and at the end straight lines move
towards their neighbours as far as there is room.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from math import inf
from statistics import fmean
from typing import TypeAlias

from sagellm.graphs.layout.ranks import GridCell

Neighbours: TypeAlias = Mapping[GridCell, Sequence[GridCell]]
Segment: TypeAlias = tuple[GridCell, GridCell]  # an upper and a lower cell

COLUMN_GAP = 28.0
_NUM_SWEEPS = 8


def centres(
    rows: Sequence[Sequence[GridCell]],
    lower: Neighbours,
    near: tuple[Neighbours, Neighbours],
    widths: Mapping[GridCell, float],
) -> dict[GridCell, float]:
    """The x of the middle of each cell. Cells of a row keep their order, at least COLUMN_GAP apart.

    `lower`: the neighbours below each cell. `near`: the neighbours above each cell, and the
    neighbours below it, with which the cell may be aligned. Two cells are aligned only if each is
    in `near` of the other.
    """
    crossed = _crossed(rows, lower)
    found = []
    for turned, sides in ((rows, near), (rows[::-1], near[::-1])):
        for sign in (1, -1):
            # Each of the four corners is the upper left one of a turned or mirrored layout.
            each = [list(row)[::sign] for row in turned]
            x = _compacted(each, _blocks(each, sides, crossed), widths)
            found.append({cell: sign * value for cell, value in x.items()})
    return _tightened(rows, lower, _balanced(found, widths), widths)


def _crossed(rows: Sequence[Sequence[GridCell]], lower: Neighbours) -> set[Segment]:
    """The segments that may not become straight: one of each pair that crosses.

    An inner segment, a part of a long edge that touches neither of the edge's boxes, is chosen only
    if both segments of the pair are inner.
    """
    crossed: set[Segment] = set()
    for row, below in pairwise(rows):
        place = {cell: n for n, cell in enumerate(below)}
        segments = [(cell, end) for cell in row for end in lower[cell]]
        for one, other in combinations(segments, 2):
            if one[0] != other[0] and place[one[1]] > place[other[1]]:
                crossed.add(other if _is_inner(one) else one)
    return crossed


def _is_inner(segment: Segment) -> bool:
    return not any(isinstance(cell, str) for cell in segment)


def _blocks(
    rows: Sequence[Sequence[GridCell]],
    near: tuple[Neighbours, Neighbours],
    crossed: set[Segment],
) -> dict[GridCell, GridCell]:
    """For each cell, the topmost cell of its block. A block is a vertical line of aligned cells."""
    root: dict[GridCell, GridCell] = {cell: cell for row in rows for cell in row}
    for before, row in pairwise(rows):
        place = {cell: n for n, cell in enumerate(before)}
        last = -1
        for cell in row:
            above = (one for one in near[0][cell] if cell in near[1][one])
            wish = sorted(above, key=lambda one: place[one])
            # Align with the median neighbour; of two medians, with the first that is free.
            for middle in wish[(len(wish) - 1) // 2 : len(wish) // 2 + 1]:
                # A line that begins left of `last` would cross a line that is straight already.
                free = root[cell] == cell and last < place[middle]
                if free and not {(middle, cell), (cell, middle)} & crossed:
                    root[cell] = root[middle]
                    last = place[middle]
    return root


def _compacted(
    rows: Sequence[Sequence[GridCell]],
    root: Mapping[GridCell, GridCell],
    widths: Mapping[GridCell, float],
) -> dict[GridCell, float]:
    """The x of each cell: all blocks as far left as possible, then each block moved right until it
    meets the next block.
    """
    right: dict[GridCell, dict[GridCell, float]] = {block: {} for block in root.values()}
    left: dict[GridCell, dict[GridCell, float]] = {block: {} for block in right}
    for row in rows:
        for one, other in pairwise(row):
            apart = (widths[one] + widths[other]) / 2 + COLUMN_GAP
            apart = max(apart, right[root[one]].get(root[other], 0.0))
            right[root[one]][root[other]] = left[root[other]][root[one]] = apart
    order = _from_left(left, right)
    x: dict[GridCell, float] = {}
    for block in order:
        x[block] = max((x[one] + apart for one, apart in left[block].items()), default=0.0)
    for block in reversed(order):
        room = (x[other] - apart for other, apart in right[block].items())
        x[block] = max(x[block], min(room, default=x[block]))
    return {cell: x[block] for cell, block in root.items()}


def _from_left(
    left: Mapping[GridCell, Mapping[GridCell, float]],
    right: Mapping[GridCell, Mapping[GridCell, float]],
) -> list[GridCell]:
    """The blocks in an order in which each block comes after all blocks to its left."""
    num_left = {block: len(others) for block, others in left.items()}
    order = [block for block, count in num_left.items() if count == 0]
    for block in order:  # the loop appends to `order`
        for other in right[block]:
            num_left[other] -= 1
            if num_left[other] == 0:
                order.append(other)
    return order


def _balanced(
    found: Sequence[Mapping[GridCell, float]], widths: Mapping[GridCell, float]
) -> dict[GridCell, float]:
    """The mean of the two median positions of each cell, after all layouts have been moved to the
    sides of the narrowest layout.
    """

    def side(x: Mapping[GridCell, float], pick: Callable[..., float], sign: int) -> float:
        return pick((value + sign * widths[cell] / 2 for cell, value in x.items()), default=0.0)

    lefts = [side(x, min, -1) for x in found]
    rights = [side(x, max, 1) for x in found]
    best = min(range(len(found)), key=lambda n: rights[n] - lefts[n])
    # Layouts 1 and 3 were mirrored, so their right sides are aligned instead of their left sides.
    moves = [
        rights[best] - rights[n] if n % 2 else lefts[best] - lefts[n] for n in range(len(found))
    ]
    balanced = {}
    for cell in found[0]:
        middle = sorted(x[cell] + move for x, move in zip(found, moves, strict=True))[1:3]
        balanced[cell] = sum(middle) / 2
    return balanced


def _tightened(
    rows: Sequence[Sequence[GridCell]],
    lower: Neighbours,
    x: dict[GridCell, float],
    widths: Mapping[GridCell, float],
) -> dict[GridCell, float]:
    """Move each straight line towards the mean of its neighbours, as far as there is room. Changes
    and returns `x`.
    """
    lines = _straight(lower, x)
    joined: dict[GridCell, list[GridCell]] = {cell: [] for cell in x}
    for cell, ends in lower.items():
        for end in ends:
            joined[cell].append(end)
            joined[end].append(cell)
    room = _Room(rows, widths)
    for _ in range(_NUM_SWEEPS):
        for line in lines:
            inside = set(line)
            # A line moves as a whole, so that it stays straight.
            others = [x[end] for cell in line for end in joined[cell] if end not in inside]
            wish = (fmean(others) if others else min(x.values())) - x[line[0]]
            left = min(room.left(cell, x) for cell in line)
            right = min(room.right(cell, x) for cell in line)
            step = max(min(wish, right), -left)
            x.update({cell: x[cell] + step for cell in line})
    return x


def _straight(lower: Neighbours, x: Mapping[GridCell, float]) -> list[list[GridCell]]:
    """Groups of cells that have the same x and are joined by edges. A single cell is a group."""
    lines: dict[GridCell, list[GridCell]] = {cell: [cell] for cell in x}
    for cell, ends in lower.items():
        for end in ends:
            if abs(x[cell] - x[end]) < 1e-6 and lines[cell] is not lines[end]:
                lines[cell].extend(lines[end])
                for moved in lines[end]:
                    lines[moved] = lines[cell]
    return list({id(line): line for line in lines.values()}.values())


class _Room:
    """How far a cell may move to either side, up to COLUMN_GAP from the next cell in its row."""

    def __init__(
        self, rows: Sequence[Sequence[GridCell]], widths: Mapping[GridCell, float]
    ) -> None:
        self._before = {right: left for row in rows for left, right in pairwise(row)}
        self._after = {left: right for right, left in self._before.items()}
        self._widths = widths

    def left(self, cell: GridCell, x: Mapping[GridCell, float]) -> float:
        return self._between(self._before[cell], cell, x) if cell in self._before else inf

    def right(self, cell: GridCell, x: Mapping[GridCell, float]) -> float:
        return self._between(cell, self._after[cell], x) if cell in self._after else inf

    def _between(self, left: GridCell, right: GridCell, x: Mapping[GridCell, float]) -> float:
        least = (self._widths[left] + self._widths[right]) / 2 + COLUMN_GAP
        return max(x[right] - x[left] - least, 0.0)
