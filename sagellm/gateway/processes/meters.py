"""What gateways count in their processes, and what they add up to."""

from collections.abc import Iterable

from sagellm.gateway.metrics.meters import CALL_S, Call, HttpMeters
from sagellm.gateway.processes.door import RemoteDoor
from sagellm.gateway.processes.messages import Counted, Histogram
from sagellm.runtime.buckets import Buckets


class RemoteMeters(HttpMeters):
    """Those of one gateway. The exposition is the graph's, who asks all gateways for it."""

    def __init__(self, door: RemoteDoor, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._door = door

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return await self._door.scrape(accept)


def counted(meters: HttpMeters, number: int = 0) -> Counted:
    return Counted(
        number,
        meters.num_active,
        meters.num_disconnects,
        meters.num_dropped_lines,
        [(*call, number) for call, number in meters.requests.items()],
        [(*call, status, number) for (call, status), number in meters.responses.items()],
        [(*call, Histogram.of(seconds)) for call, seconds in meters.seconds.items()],
        Histogram.of(meters.all_seconds),
        Histogram.of(meters.app_lag.seconds),
    )


class SummedMeters(HttpMeters):
    """Those of several gateways, in the process of the graph."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._num_dropped_lines = 0

    @property
    def num_dropped_lines(self) -> int:
        return self._num_dropped_lines

    def add(self, counted: Counted, *, is_alive: bool) -> None:
        """What one gateway has counted in its life; nothing is under way in one that is over."""
        self.num_active += counted.num_active if is_alive else 0
        self.num_disconnects += counted.num_disconnects
        self._num_dropped_lines += counted.num_dropped_lines
        for *named, number in counted.requests:
            call = Call(*named)
            self.requests[call] = self.requests.get(call, 0) + number
        for endpoint, method, status, number in counted.responses:
            key = Call(endpoint, method), status
            self.responses[key] = self.responses.get(key, 0) + number
        for endpoint, method, seconds in counted.seconds:
            seconds.add_to(self.seconds.setdefault(Call(endpoint, method), Buckets(CALL_S)))
        counted.all_seconds.add_to(self.all_seconds)
        counted.app_lag.add_to(self.app_lag.seconds)
