"""When a worker that died is started again, and when it is given up: as Erlang's supervisors do."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The first restart comes after `first_s`, each next one after twice as long, `longest_s` at
    most, all times by up to `jitter` longer or shorter. More than `most` deaths within `within_s`:
    the worker is given up. One whose link fails is not: after `most_cuts` in a row it is left
    alone for `ejected_s`, tried again, left alone for twice that, three times, and so on,
    `longest_ejected_s` at most, where others can do its work. A life of `healthy_s` begins anew.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    jitter: float = 0.2
    most: int = 5
    within_s: float = 60.0
    healthy_s: float = 60.0
    most_cuts: int = 5
    ejected_s: float = 10.0
    longest_ejected_s: float = 300.0


@dataclass(slots=True)
class Restarts:
    """The deaths of one worker; times are of one clock, in seconds."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    count: int = 0  # restarts since the graph was opened
    is_ejected: bool = False  # by the last cut
    _num_in_row: int = 0
    _num_cuts: int = 0  # in a row
    _num_ejections: int = 0  # in a row
    _deaths: deque[float] = field(default_factory=deque)

    def died(self, now: float, *, ready_s: float | None, draw: float) -> float | None:
        """The delay until the next start; None where it is given up.

        `ready_s`: when this life became ready, if it did. `draw`: uniform in [0, 1).
        """
        self._end_life(now, ready_s)
        self._num_cuts = 0
        self._deaths.append(now)
        while self._deaths[0] < now - self.policy.within_s:
            self._deaths.popleft()
        if len(self._deaths) > self.policy.most:
            return None
        return self._next_delay_s(draw)

    def cut(self, now: float, *, ready_s: float | None, draw: float, may_eject: bool) -> float:
        """The delay until the next start of one whose link failed; see `died`."""
        self._end_life(now, ready_s)
        self._num_cuts += 1
        self.is_ejected = may_eject and self._num_cuts >= self.policy.most_cuts
        if not self.is_ejected:
            return self._next_delay_s(draw)
        self._num_ejections += 1
        self.count += 1
        return min(self.policy.ejected_s * self._num_ejections, self.policy.longest_ejected_s)

    def forgive(self) -> None:
        """Somebody restarts it by hand: what was counts no more."""
        self._num_in_row = self._num_cuts = self._num_ejections = 0
        self._deaths.clear()

    def _end_life(self, now: float, ready_s: float | None) -> None:
        self.is_ejected = False
        if ready_s is not None and now - ready_s >= self.policy.healthy_s:
            self._num_in_row = self._num_cuts = self._num_ejections = 0

    def _next_delay_s(self, draw: float) -> float:
        policy = self.policy
        doubled = 2.0 ** min(self._num_in_row, 1000)  # a float ends at 2**1024
        delay_s = min(policy.first_s * doubled, policy.longest_s)
        self._num_in_row += 1
        self.count += 1
        return delay_s * (1 + policy.jitter * (2 * draw - 1))
