"""When a worker that died is started again, and when it is given up: as Erlang's supervisors do."""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The first restart comes after `first_s`, each next one after twice as long, `longest_s` at
    most, all times by up to `jitter` longer or shorter. More than `most` deaths within `within_s`:
    the worker is given up. A life of `healthy_s` begins anew.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    jitter: float = 0.2
    most: int = 5
    within_s: float = 60.0
    healthy_s: float = 60.0


@dataclass(slots=True)
class Restarts:
    """The deaths of one worker; times are of one clock, in seconds."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    count: int = 0  # restarts since the graph was opened
    _num_in_row: int = 0
    _deaths: deque[float] = field(default_factory=deque)

    def died(self, now: float, *, ready_s: float | None, draw: float) -> float | None:
        """The delay until the next start; None where it is given up.

        `ready_s`: when this life became ready, if it did. `draw`: uniform in [0, 1).
        """
        policy = self.policy
        if ready_s is not None and now - ready_s >= policy.healthy_s:
            self._num_in_row = 0
        self._deaths.append(now)
        while self._deaths[0] < now - policy.within_s:
            self._deaths.popleft()
        if len(self._deaths) > policy.most:
            return None
        delay_s = min(policy.first_s * 2.0**self._num_in_row, policy.longest_s)
        self._num_in_row += 1
        self.count += 1
        return float(delay_s * (1 + policy.jitter * (2 * draw - 1)))

    def forgive(self) -> None:
        """Somebody restarts it by hand: what was counts no more."""
        self._num_in_row = 0
        self._deaths.clear()
