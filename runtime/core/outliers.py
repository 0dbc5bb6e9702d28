"""Replicas whose transfers or computations fail again and again, over a bad link or by bad memory
or weights: routed around.

As in Envoy's outlier detection: after `MOST_FAULTS` faults in a row a replica is ejected, for
`FIRST_S` the first time, twice that the second, and so on; then it is tried again. Never more than
half of an engine's replicas are, whatever they do. What is under way there goes on. Of the two ends
of a transfer, the one that failed with more others is to blame, or else the receiver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

MOST_FAULTS = 5
FIRST_S = 10.0
_MOST_KEPT = 4 * MOST_FAULTS

Replica: TypeAlias = tuple[str, int]  # an engine's name and a number


@dataclass(slots=True)
class _Record:
    """`peers`: with whom its last transfers failed, since one succeeded; `because`: those for whom
    it is ejected.
    """

    replica: Replica
    peers: list[Replica] = field(default_factory=list)
    because: list[Replica] = field(default_factory=list)
    num_ejections: int = 0  # in a row
    until_s: float | None = None  # while it is ejected
    back_s: float = 0.0  # since when it is not


class Presence(Protocol):
    """Which replicas are there."""

    def is_lost(self, replica: Replica) -> bool: ...

    def num_present(self, engine: str) -> int: ...


class Outliers:
    """`on_change(replica, for_s)` is called as a replica is ejected for so many seconds, and with 0
    as it is readmitted. `clock` is the core's.
    """

    def __init__(
        self,
        presence: Presence,
        clock: Callable[[], float],
        on_change: Callable[[Replica, float], None],
    ) -> None:
        self.num_ejections: dict[Replica, int] = {}  # ever
        self.suspects: set[Replica] = set()  # whose engine failed, and gave no token since
        self._presence = presence
        self._clock = clock
        self._on_change = on_change
        self._records: dict[Replica, _Record] = {}

    def failed(self, sender: Replica, receiver: Replica) -> None:
        """A transfer between them did; either may be to blame, unless one of them is lost."""
        if self._presence.is_lost(sender) or self._presence.is_lost(receiver):
            return
        ends = [self._records.setdefault(one, _Record(one)) for one in (receiver, sender)]
        for record, peer in zip(ends, (sender, receiver), strict=True):
            record.peers.append(peer)
            del record.peers[:-_MOST_KEPT]
        for record in sorted(ends, key=lambda record: -len(set(record.peers))):
            is_due = record.until_s is None and len(record.peers) >= MOST_FAULTS
            if is_due and self._eject(record):
                self._absolve(record.replica)

    def passed(self, sender: Replica, receiver: Replica) -> None:
        """A transfer succeeded: neither is to blame for those before."""
        for replica in (sender, receiver):
            record = self._records.get(replica)
            if record is None:
                continue
            record.peers.clear()
            if record.until_s is None and self._has_been_well(record):
                del self._records[replica]

    def computed_wrong(self, replica: Replica) -> None:
        """Its engine failed on a request, whoever else took part."""
        if self._presence.is_lost(replica):
            return
        self.suspects.add(replica)
        record = self._records.setdefault(replica, _Record(replica))
        record.peers.append(replica)
        del record.peers[:-_MOST_KEPT]
        if record.until_s is None and len(record.peers) >= MOST_FAULTS:
            self._eject(record)

    def computed(self, replica: Replica) -> None:
        """Its engine gave a token: what failed before was the requests' own."""
        self.suspects.discard(replica)
        self.passed(replica, replica)

    def forget(self, replica: Replica) -> None:
        """It is gone, or is back anew: what failed with it is nobody's fault any more."""
        self.suspects.discard(replica)
        record = self._records.pop(replica, None)
        if record is not None and record.until_s is not None:
            self._on_change(replica, 0.0)
        self._absolve(replica)
        for other in self._records.values():
            if other.until_s is not None and replica in other.because:
                other.because = [peer for peer in other.because if peer != replica]
                if len(other.because) < MOST_FAULTS:
                    self._readmit(other)
        self._keep_half(replica[0])

    def is_ejected(self, replica: Replica) -> bool:
        record = self._records.get(replica)
        return record is not None and record.until_s is not None

    @property
    def next_end_s(self) -> float:
        """When the next one is tried again."""
        ends = (record.until_s for record in self._records.values())
        return min((end for end in ends if end is not None), default=math.inf)

    def readmit_due(self) -> None:
        """Try those again whose time has come."""
        for record in self._records.values():
            if record.until_s is not None and record.until_s <= self._clock():
                self._readmit(record)

    def _absolve(self, culprit: Replica) -> None:
        """What failed with it was nobody else's fault."""
        for record in self._records.values():
            if record.replica != culprit:
                record.peers = [peer for peer in record.peers if peer != culprit]

    def _ejected(self, engine: str) -> list[_Record]:
        records = self._records.values()
        return [one for one in records if one.replica[0] == engine and one.until_s is not None]

    def _keep_half(self, engine: str) -> None:
        """Where others are lost, those that are ejected are needed: the next in line first."""
        out = sorted(self._ejected(engine), key=lambda record: record.until_s or 0.0)
        while 2 * len(out) > self._presence.num_present(engine):
            self._readmit(out.pop(0))

    def _eject(self, record: _Record) -> bool:
        """Unless too many are out already."""
        engine, _ = record.replica
        if 2 * (len(self._ejected(engine)) + 1) > self._presence.num_present(engine):
            return False
        record.because = record.peers[-MOST_FAULTS:]
        record.num_ejections += 1
        for_s = FIRST_S * record.num_ejections
        record.until_s = self._clock() + for_s
        self.num_ejections[record.replica] = self.num_ejections.get(record.replica, 0) + 1
        self._on_change(record.replica, for_s)
        return True

    def _readmit(self, record: _Record) -> None:
        record.until_s, record.back_s = None, self._clock()
        record.peers.clear()
        record.because.clear()
        self._on_change(record.replica, 0.0)

    def _has_been_well(self, record: _Record) -> bool:
        """For as long as it was out the last time."""
        return self._clock() - record.back_s >= FIRST_S * record.num_ejections
