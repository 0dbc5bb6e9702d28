"""The watchdog of an engine: how long its steps take, and whether it hangs."""

from sagellm.runtime.histograms import LogHistogram
from sagellm.runtime.port import EngineHealth

_LEAST_S = 4.5  # without progress, before an engine counts as hung: /ready says so within 5 s
_NUM_STEPS = 20.0  # an engine may be silent for as long as this many of its slowest steps


class Watchdog:
    """Watches the steps of one engine. The engine passes the times, in seconds of its clock."""

    def __init__(self) -> None:
        self._step_times = LogHistogram()
        self._started_s: float | None = None
        self._progressed_s = 0.0

    def start_step(self, now: float) -> None:
        self._started_s = now

    def finish_step(self, now: float) -> None:
        """The step that began last has ended, or failed."""
        assert self._started_s is not None
        self._step_times = self._step_times.with_sample(now - self._started_s)
        self._started_s = None
        self._progressed_s = now

    def reset(self, now: float) -> None:
        """Restart the timeout: only now can the engine advance, as work came or a reader made room.

        An engine that may not advance does not hang.
        """
        self._progressed_s = now

    def health(self, now: float, *, has_work: bool) -> EngineHealth:
        """The health at `now`. `has_work`: some sequence has a reader that takes its events."""
        slowest_s = self._step_times.quantile(0.99)
        timeout_s = max(_LEAST_S, _NUM_STEPS * (slowest_s or 0.0))
        started_s = self._started_s
        return EngineHealth(
            busy_for_s=0.0 if started_s is None else now - started_s,
            step_p99_s=slowest_s,
            num_steps=self._step_times.num_samples,
            is_hung=(has_work or started_s is not None) and now - self._progressed_s > timeout_s,
        )
