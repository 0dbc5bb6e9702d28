"""Circuit breakers of links between workers, over which KV transfers fail."""

from dataclasses import dataclass
from typing import TypeAlias

from sagellm.graphs.log import get_logger

log = get_logger("sagellm.kv")

_End: TypeAlias = tuple[str, int]  # an engine's name and a replica
TransferLink: TypeAlias = tuple[_End, _End]  # from sender to receiver

MAX_FAILURES = 5  # in a row; then the link rests
_SLOW_S = 1.0  # a transfer that takes so long to fail counts for all of them
_SHARE = 4.0  # it rests for so many times as long as its last transfer took to fail,
_LEAST_S, _LONGEST_S = 0.25, 30.0  # at least and at most


@dataclass(slots=True)
class _Record:
    """`num_failed`: in a row. `is_tried`: a transfer is under way, after a rest."""

    num_failed: int = 0
    rests_until_s: float = 0.0
    is_tried: bool = False


class CircuitBreaker:
    """Says whether a transfer is worth trying. All times are of one clock.

    A link that fails rests between two tries, so that those who wait for a place to transfer do not
    wait for one failure after the other.
    """

    def __init__(self) -> None:
        self._records: dict[TransferLink, _Record] = {}

    def begin(self, link: TransferLink, now: float) -> bool:
        """Whether to try. Then the caller says how it ended: `passed`, `failed` or `left`."""
        record = self._records.setdefault(link, _Record())
        if record.num_failed < MAX_FAILURES:
            return True
        if record.is_tried or now < record.rests_until_s:
            return False
        record.is_tried = True
        return True

    def passed(self, link: TransferLink) -> None:
        record = self._records[link]
        if record.num_failed >= MAX_FAILURES:
            log.info("kv_link_back", **_named(link))
        self._records[link] = _Record()

    def failed(self, link: TransferLink, now: float, *, took_s: float) -> None:
        record = self._records[link]
        record.is_tried = False
        was_resting = record.num_failed >= MAX_FAILURES
        record.num_failed += MAX_FAILURES if took_s >= _SLOW_S else 1
        record.rests_until_s = now + min(max(_SHARE * took_s, _LEAST_S), _LONGEST_S)
        if record.num_failed >= MAX_FAILURES and not was_resting:
            log.warning("kv_link_rests", **_named(link), took_s=round(took_s, 3))

    def left(self, link: TransferLink) -> None:
        """The transfer ended for a reason that says nothing of the link."""
        self._records[link].is_tried = False


def _named(link: TransferLink) -> dict[str, str]:
    (sender, from_number), (receiver, to_number) = link
    return {"sender": f"{sender}[{from_number}]", "receiver": f"{receiver}[{to_number}]"}
