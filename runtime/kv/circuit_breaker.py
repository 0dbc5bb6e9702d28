"""Circuit breakers of the links between workers over which KV transfers fail."""

from dataclasses import dataclass
from typing import TypeAlias

from sagellm.graphs.log import get_logger

log = get_logger("sagellm.kv")

_End: TypeAlias = tuple[str, int]  # an engine's name and a replica
TransferLink: TypeAlias = tuple[_End, _End]  # from sender to receiver

MAX_FAILURES = 5  # in a row; then the breaker opens
_SLOW_S = 1.0  # a failure that takes so long counts for `MAX_FAILURES`
# An open breaker lets no transfer through for this multiple of the time that the last transfer took
# to fail, within bounds.
_SHARE = 4.0
_LEAST_S, _LONGEST_S = 0.25, 30.0


@dataclass(slots=True)
class _Record:
    """`num_failed`: failures in a row. `is_tried`: the one transfer that tests an open breaker is
    under way.
    """

    num_failed: int = 0
    rests_until_s: float = 0.0
    is_tried: bool = False


class CircuitBreaker:
    """One breaker a link: says whether a transfer is worth trying. All times are of one clock.

    After `MAX_FAILURES` failures in a row the breaker opens, and lets one transfer through after
    each pause. Requests that wait for a transfer slot do not wait for one failure after the other.
    """

    def __init__(self) -> None:
        self._records: dict[TransferLink, _Record] = {}

    def begin(self, link: TransferLink, now: float) -> bool:
        """Whether to try a transfer. If so, the caller must report its end: `passed`, `failed` or
        `left`.
        """
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
        """Report a transfer that ended for a reason of its request, such as a cancel."""
        self._records[link].is_tried = False


def _named(link: TransferLink) -> dict[str, str]:
    (sender, from_number), (receiver, to_number) = link
    return {"sender": f"{sender}[{from_number}]", "receiver": f"{receiver}[{to_number}]"}
