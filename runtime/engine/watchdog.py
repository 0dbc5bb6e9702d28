"""The pulse of an engine: how long its steps take, and when it moved last."""

from sagellm.runtime.histograms import LogHistogram
from sagellm.runtime.port import EngineHealth

_LEAST_S = 4.5  # without progress, before an engine counts as hung: /ready says so within 5 s
_NUM_STEPS = 20.0  # as long as so many of its slowest steps


class Watchdog:
    """Times are of the engine's clock, in seconds; the engine says what happens when."""

    def __init__(self) -> None:
        self._step_times = LogHistogram()
        self._started_s: float | None = None
        self._moved_s = 0.0

    def start(self, now: float) -> None:
        """A step begins."""
        self._started_s = now

    def finish(self, now: float) -> None:
        """The step that began last has ended, well or badly."""
        assert self._started_s is not None
        self._step_times = self._step_times.with_sample(now - self._started_s)
        self._started_s = None
        self._moved_s = now

    def move(self, now: float) -> None:
        """Something else allows progress from now on: work came, a reader made room."""
        self._moved_s = now

    def health(self, now: float, *, has_work: bool) -> EngineHealth:
        """`has_work`: sequences are here whose readers take what is drawn for them."""
        slowest_s = self._step_times.quantile(0.99)
        patience_s = max(_LEAST_S, _NUM_STEPS * (slowest_s or 0.0))
        started_s = self._started_s
        return EngineHealth(
            busy_for_s=0.0 if started_s is None else now - started_s,
            step_p99_s=slowest_s,
            num_steps=self._step_times.num_samples,
            is_hung=(has_work or started_s is not None) and now - self._moved_s > patience_s,
        )
