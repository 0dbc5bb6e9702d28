"""The row of each box in a layered layout: every edge leads down, cycles and feedback aside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Pair: TypeAlias = tuple[str, str]  # an upper and a lower box

_END = "\0end"  # of a band, after its title; no box is named so


@dataclass(frozen=True, slots=True)
class LayoutEdge:
    """An edge to draw. `is_back`: it may lead up. `label_width` 0: it has no label.

    A label stands after the row of the source, or before that of the target with `at_target`.
    A box stands in line along those of its edges that have the least `priority` number.
    """

    source: str
    target: str
    is_back: bool = False
    label_width: float = 0.0
    at_target: bool = False
    priority: int = 0

    @property
    def is_loop(self) -> bool:
        return self.source == self.target


@dataclass(frozen=True, slots=True)
class Band:
    """Boxes in rows of their own, framed; `title` names the box that holds the frame's title."""

    title: str
    members: tuple[str, ...]


def ranks(
    names: Sequence[str], links: Sequence[LayoutEdge], bands: Sequence[Band]
) -> dict[str, int]:
    """Longest path from above, counted from 0. No two ends of a link share a rank, loops aside.

    A band has its title above its members. What feeds a member is above the title, and what a
    member feeds is below all members.
    """
    firm = [*_forward(links), *_around(links, bands)]
    ends = [band.title + _END for band in bands]
    place = {name: n for n, name in enumerate(_sequence([*names, *ends], firm))}
    loose = [(link.source, link.target) for link in links if link.is_back and not link.is_loop]
    found = _longest(place, [*firm, *loose])
    return _dense({name: found[name] for name in names})


def _forward(links: Iterable[LayoutEdge]) -> list[Pair]:
    return [(link.source, link.target) for link in links if not (link.is_back or link.is_loop)]


def _around(links: Sequence[LayoutEdge], bands: Iterable[Band]) -> Iterable[Pair]:
    forward = _forward(links)
    for band in bands:
        members, end = set(band.members), band.title + _END
        for member in band.members:
            yield band.title, member
            yield member, end
        for source, target in forward:
            if target in members and source not in members:
                yield source, band.title
            if source in members and target not in members:
                yield end, target


def _sequence(names: Sequence[str], pairs: Iterable[Pair]) -> list[str]:
    """Upper boxes first; where only cycles are left, the first box left comes next."""
    above: dict[str, set[str]] = {name: set() for name in names}
    for upper, lower in pairs:
        above[lower].add(upper)
    done: dict[str, None] = {}
    while above:
        free = next((name for name in above if above[name] <= done.keys()), next(iter(above)))
        del above[free]
        done[free] = None
    return list(done)


def _longest(place: Mapping[str, int], pairs: Iterable[Pair]) -> dict[str, int]:
    """Ranks by longest path, each pair turned so that it leads forward in the sequence."""
    above: dict[str, list[str]] = {name: [] for name in place}
    for pair in pairs:
        upper, lower = sorted(pair, key=lambda name: place[name])
        above[lower].append(upper)
    rank: dict[str, int] = {}
    for name in place:
        rank[name] = 1 + max((rank[upper] for upper in above[name]), default=-1)
    return rank


def _dense(rank: Mapping[str, int]) -> dict[str, int]:
    number = {value: n for n, value in enumerate(sorted(set(rank.values())))}
    return {name: number[value] for name, value in rank.items()}


def shortcuts(rank: Mapping[str, int], links: Sequence[LayoutEdge]) -> frozenset[int]:
    """The numbers of the links whose ends a longer way joins too."""
    below: dict[str, set[str]] = {name: set() for name in rank}
    for link in links:
        if not link.is_loop:
            upper, lower = _ends(rank, link)
            below[upper].add(lower)
    bit = {name: 1 << number for number, name in enumerate(rank)}
    reached: dict[str, int] = {}
    for name in sorted(rank, key=lambda name: -rank[name]):
        reached[name] = 0
        for lower in below[name]:
            reached[name] |= reached[lower] | bit[lower]
    return frozenset(
        number
        for number, (upper, lower) in enumerate(_ends(rank, link) for link in links)
        if any(reached[other] & bit[lower] for other in below[upper])
    )


def _ends(rank: Mapping[str, int], link: LayoutEdge) -> Pair:
    upper, lower = sorted((link.source, link.target), key=lambda name: rank[name])
    return upper, lower


def spine(rank: Mapping[str, int], links: Sequence[LayoutEdge]) -> frozenset[int]:
    """The numbers of the links of one longest way from the lowest box up, all of priority 0."""
    above: dict[str, list[int]] = {name: [] for name in rank}
    for number, link in enumerate(links):
        if link.priority == 0 and not link.is_loop:
            above[_ends(rank, link)[1]].append(number)
    reached = [name for name, numbers in above.items() if numbers]
    at = max(reached, key=lambda name: rank[name], default=None)
    found = []
    while at is not None and above[at]:
        near = max(rank[_ends(rank, links[number])[0]] for number in above[at])
        ways = [number for number in above[at] if rank[_ends(rank, links[number])[0]] == near]
        found.append(ways[(len(ways) - 1) // 2])
        at = _ends(rank, links[found[-1]])[0]
    return frozenset(found)
