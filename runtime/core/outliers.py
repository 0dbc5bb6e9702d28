"""Outlier detection: replicas that fail repeatedly get no new requests for some time.

A fault is a failed KV transfer (bad link) or a failed computation (bad memory or weights). After
`MOST_FAULTS` faults in a row a replica is ejected, as in Envoy: for `FIRST_S` seconds the first
time, 2 * `FIRST_S` the second time, and so on. Then it gets requests again. At most half of an
engine's replicas are ejected at a time. Requests on an ejected replica continue.

A failed transfer counts against both of its replicas. If both are due for ejection, the replica
whose transfers failed with more different peers is ejected, and on a tie the receiver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sagellm.runtime.messages import EngineReplica

MOST_FAULTS = 5
FIRST_S = 10.0
_MAX_PEERS = 4 * MOST_FAULTS  # faults that are kept for each replica, to bound the memory


@dataclass(slots=True)
class _Record:
    """The faults of one replica.

    `peers`: the other replica of each failed transfer since the last success; for a failed
    computation, the replica itself. `because`: the part of `peers` that led to the ejection.
    """

    replica: EngineReplica
    peers: list[EngineReplica] = field(default_factory=list)
    because: list[EngineReplica] = field(default_factory=list)
    num_ejections: int = 0  # ejections without a rehabilitation between them
    until_s: float | None = None  # end of the ejection; None while admitted
    back_s: float = 0.0  # end of the last ejection


class Presence(Protocol):
    """The questions of `Outliers` about the availability of replicas."""

    def is_lost(self, replica: EngineReplica) -> bool: ...

    def num_present(self, engine: str) -> int: ...


class Outliers:
    """Counts faults, and ejects and readmits replicas.

    `on_change(replica, for_s)` is called when a replica is ejected for `for_s` seconds, and with 0
    seconds when it is readmitted. `clock`: the core's clock, in seconds.
    """

    def __init__(
        self,
        presence: Presence,
        clock: Callable[[], float],
        on_change: Callable[[EngineReplica, float], None],
    ) -> None:
        self.num_ejections: dict[tuple[str, int], int] = {}  # by replica, since the start
        self.suspects: set[EngineReplica] = set()  # replicas without a token since a failure
        self._presence = presence
        self._clock = clock
        self._on_change = on_change
        self._records: dict[tuple[str, int], _Record] = {}

    def failed(self, sender: EngineReplica, receiver: EngineReplica) -> None:
        """Count a failed transfer against both replicas, and eject a replica that is due.

        A transfer with a lost replica does not count: the loss explains the failure.
        """
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
        """Clear the faults of both replicas after a transfer that succeeded."""
        for replica in (sender, receiver):
            record = self._records.get(replica)
            if record is None:
                continue
            record.peers.clear()
            if record.until_s is None and self._is_rehabilitated(record):
                del self._records[replica]

    def computed_wrong(self, replica: EngineReplica) -> None:
        """Count a request that the engine of a replica failed to compute."""
        if self._presence.is_lost(replica):
            return
        self.suspects.add(replica)
        record = self._records.setdefault(replica, _Record(replica))
        record.peers.append(replica)
        del record.peers[:-_MAX_PEERS]
        if record.until_s is None and len(record.peers) >= MOST_FAULTS:
            self._eject(record)

    def computed(self, replica: EngineReplica) -> None:
        """Clear the faults of a replica whose engine gave a token.

        An engine that can still compute did not cause its earlier failures; the requests did.
        """
        self.suspects.discard(replica)
        self.passed(replica, replica)

    def forget(self, replica: EngineReplica) -> None:
        """Forget all faults of and with a replica that was lost, or is back with a new process."""
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
        """The time at which the next replica is readmitted; infinite if none is ejected."""
        ends = (record.until_s for record in self._records.values())
        return min((end for end in ends if end is not None), default=math.inf)

    def readmit_due(self) -> None:
        """Readmit the replicas whose ejection is over."""
        for record in self._records.values():
            if record.until_s is not None and record.until_s <= self._clock():
                self._readmit(record)

    def _clear_peer(self, culprit: EngineReplica) -> None:
        """Clear the faults that other replicas have because of the ejected `culprit`."""
        for record in self._records.values():
            if record.replica != culprit:
                record.peers = [peer for peer in record.peers if peer != culprit]

    def _ejected(self, engine: str) -> list[_Record]:
        records = self._records.values()
        return [one for one in records if one.replica.engine == engine and one.until_s is not None]

    def _readmit_for_quorum(self, engine: str) -> None:
        """Readmit replicas until at most half of the present replicas are ejected.

        The replicas whose ejection ends first are readmitted first.
        """
        out = sorted(self._ejected(engine), key=lambda record: record.until_s or 0.0)
        while 2 * len(out) > self._presence.num_present(engine):
            self._readmit(out.pop(0))

    def _eject(self, record: _Record) -> bool:
        """Eject a replica, unless too many are ejected. Returns whether it was ejected."""
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
        """Whether a replica has worked for as long as its last ejection lasted."""
        return self._clock() - record.back_s >= FIRST_S * record.num_ejections
