"""Outlier detection: replicas that fail again and again get no new requests for some time.

Transfers fail over a bad link, computations by bad memory or weights. After `MOST_FAULTS` faults in
a row a replica is ejected, for `FIRST_S` the first time, twice that the second time, and so on, as
in Envoy; then it is tried again. At most half of an engine's replicas are ejected. Running requests
continue. For a failed transfer, the end that failed with more peers is to blame, or else the
receiver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sagellm.runtime.messages import EngineReplica

MOST_FAULTS = 5
FIRST_S = 10.0
_MAX_PEERS = 4 * MOST_FAULTS


@dataclass(slots=True)
class _Record:
    """The faults of one replica.

    `peers`: of its failed transfers since the last success. `because`: the peers for which it is
    ejected.
    """

    replica: EngineReplica
    peers: list[EngineReplica] = field(default_factory=list)
    because: list[EngineReplica] = field(default_factory=list)
    num_ejections: int = 0  # in a row
    until_s: float | None = None  # end of the ejection; None while admitted
    back_s: float = 0.0  # end of the last ejection


class Presence(Protocol):
    """Which replicas are present."""

    def is_lost(self, replica: EngineReplica) -> bool: ...

    def num_present(self, engine: str) -> int: ...


class Outliers:
    """`on_change(replica, for_s)`: called when a replica is ejected for so long, or readmitted (0).

    `clock`: the core's.
    """

    def __init__(
        self,
        presence: Presence,
        clock: Callable[[], float],
        on_change: Callable[[EngineReplica, float], None],
    ) -> None:
        self.num_ejections: dict[tuple[str, int], int] = {}  # since the start
        self.suspects: set[EngineReplica] = set()  # their engine failed, and gave no token since
        self._presence = presence
        self._clock = clock
        self._on_change = on_change
        self._records: dict[tuple[str, int], _Record] = {}

    def failed(self, sender: EngineReplica, receiver: EngineReplica) -> None:
        """A transfer failed; either end may be to blame, unless one of them is lost."""
        if self._presence.is_lost(sender) or self._presence.is_lost(receiver):
            return
        ends = [self._records.setdefault(one, _Record(one)) for one in (receiver, sender)]
        for record, peer in zip(ends, (sender, receiver), strict=True):
            record.peers.append(peer)
            del record.peers[:-_MAX_PEERS]
        for record in sorted(ends, key=lambda record: -len(set(record.peers))):
            is_due = record.until_s is None and len(record.peers) >= MOST_FAULTS
            if is_due and self._eject(record):
                self._clear_peer(record.replica)

    def passed(self, sender: EngineReplica, receiver: EngineReplica) -> None:
        """A transfer succeeded: neither end is to blame for the failures before."""
        for replica in (sender, receiver):
            record = self._records.get(replica)
            if record is None:
                continue
            record.peers.clear()
            if record.until_s is None and self._is_rehabilitated(record):
                del self._records[replica]

    def computed_wrong(self, replica: EngineReplica) -> None:
        """The engine of a replica failed on a request."""
        if self._presence.is_lost(replica):
            return
        self.suspects.add(replica)
        record = self._records.setdefault(replica, _Record(replica))
        record.peers.append(replica)
        del record.peers[:-_MAX_PEERS]
        if record.until_s is None and len(record.peers) >= MOST_FAULTS:
            self._eject(record)

    def computed(self, replica: EngineReplica) -> None:
        """The engine of a replica gave a token: the requests caused its earlier failures."""
        self.suspects.discard(replica)
        self.passed(replica, replica)

    def forget(self, replica: EngineReplica) -> None:
        """A replica is lost, or is back with a new process: forget all faults with it."""
        self.suspects.discard(replica)
        record = self._records.pop(replica, None)
        if record is not None and record.until_s is not None:
            self._on_change(replica, 0.0)
        self._clear_peer(replica)
        for other in self._records.values():
            if other.until_s is not None and replica in other.because:
                other.because = [peer for peer in other.because if peer != replica]
                if len(other.because) < MOST_FAULTS:
                    self._readmit(other)
        self._readmit_for_quorum(replica.engine)

    def is_ejected(self, replica: tuple[str, int]) -> bool:
        record = self._records.get(replica)
        return record is not None and record.until_s is not None

    @property
    def next_end_s(self) -> float:
        """When the next replica is readmitted."""
        ends = (record.until_s for record in self._records.values())
        return min((end for end in ends if end is not None), default=math.inf)

    def readmit_due(self) -> None:
        """Readmit the replicas whose ejection is over."""
        for record in self._records.values():
            if record.until_s is not None and record.until_s <= self._clock():
                self._readmit(record)

    def _clear_peer(self, culprit: EngineReplica) -> None:
        """Clear the faults of other replicas with the culprit."""
        for record in self._records.values():
            if record.replica != culprit:
                record.peers = [peer for peer in record.peers if peer != culprit]

    def _ejected(self, engine: str) -> list[_Record]:
        records = self._records.values()
        return [one for one in records if one.replica.engine == engine and one.until_s is not None]

    def _readmit_for_quorum(self, engine: str) -> None:
        """Readmit replicas, the next in line first, where others are lost."""
        out = sorted(self._ejected(engine), key=lambda record: record.until_s or 0.0)
        while 2 * len(out) > self._presence.num_present(engine):
            self._readmit(out.pop(0))

    def _eject(self, record: _Record) -> bool:
        """Eject a replica, unless too many are ejected; True where it was."""
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

    def _is_rehabilitated(self, record: _Record) -> bool:
        """Whether a replica has been admitted for as long as its last ejection."""
        return self._clock() - record.back_s >= FIRST_S * record.num_ejections
