"""Where things are in a picture: what overlaps, what holds what, what a line crosses."""

from itertools import pairwise

from sagellm.graphs.layout.ranks import Box, Point


def overlap(one: Box, other: Box) -> bool:
    apart = one.right <= other.x or other.right <= one.x
    return not (apart or one.bottom <= other.y or other.bottom <= one.y)


def holds(box: Box, inner: Box) -> bool:
    across = box.x <= inner.x and inner.right <= box.right
    return across and box.y <= inner.y and inner.bottom <= box.bottom


def crosses(line: tuple[Point, ...], box: Box) -> bool:
    """Whether a line goes through the inside of a box, by more than the rounding of numbers."""
    inside = Box(box.x + 0.1, box.y + 0.1, box.width - 0.2, box.height - 0.2)
    for (x, y), (next_x, next_y) in pairwise(line):
        reach = Box(min(x, next_x), min(y, next_y), abs(next_x - x), abs(next_y - y))
        if overlap(reach, inside):
            return True
    return False
