"""Forecasts: predictions, and the evidence that they need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sagellm.runtime.feedback import Backlog, FirstToken, LoadReported, QueueChanged
from sagellm.runtime.forecast import Forecast, LineFit, ReplicaSpeed
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.port import EngineLoad


def first(num_tokens: int, computed_s: float, queued_s: float = 0.0) -> FirstToken:
    return FirstToken(
        seconds=queued_s + computed_s, num_computed_tokens=num_tokens, computed_s=computed_s
    )


def learned(*prefills: tuple[int, float], queued_s: float = 0.0) -> Forecast:
    forecast = Forecast()
    for num_tokens, seconds in prefills:
        forecast = forecast.after(first(num_tokens, seconds, queued_s), 0.0)
    return forecast


def ask(num_tokens: int, arrived_s: float = 0.0, num_cached_tokens: int = 0) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=(1,) * num_tokens,
        num_cached_tokens=num_cached_tokens,
        stamps=Stamps(arrived_s=arrived_s),
    )


def test_without_evidence_nothing_is_predicted() -> None:
    assert Forecast().prefill_s(100) is None
    assert learned(*[(100, 1.0)] * 7).prefill_s(100) is None
    assert Forecast().step_s is None
    assert Forecast().ttft_s(ask(10), 0.0) is None


def test_prefills_of_one_length_show_a_rate() -> None:
    assert learned(*[(100, 1.0)] * 8).prefill_s(50) == pytest.approx(0.5)


def test_prefills_of_several_lengths_show_a_line() -> None:
    """0.1 s for a prefill, and 0.01 s for each token."""
    forecast = learned(*[(10, 0.2), (100, 1.1), (50, 0.6)] * 5)
    assert forecast.prefill_s(200) == pytest.approx(2.1)
    assert forecast.prefill_s(0) == pytest.approx(0.1)


def test_a_line_never_falls() -> None:
    forecast = learned(*[(10, 1.0), (100, 0.5)] * 8)
    assert 0 < (forecast.prefill_s(10) or 0) <= (forecast.prefill_s(100) or 0)


def test_what_was_longer_ago_counts_less() -> None:
    forecast = learned(*[(100, 5.0)] * 20, *[(100, 1.0)] * 300)
    assert forecast.prefill_s(100) == pytest.approx(1.0, rel=0.1)


def test_the_first_token_of_a_cached_prompt_comes_sooner() -> None:
    forecast = learned(*[(100, 1.0)] * 20, queued_s=0.5)
    assert forecast.first_token_s(ask(100)) == pytest.approx(1.5)
    assert forecast.first_token_s(ask(100, num_cached_tokens=80)) == pytest.approx(0.7)
    unknown = Forecast().after(FirstToken(seconds=2.0), 0.0)
    assert unknown.first_token_s(ask(100, num_cached_tokens=80)) == 2.0


def waiting(forecast: Forecast, num_served: int = 0) -> Forecast:
    """A pace with four waiting requests and forty served ones, 0.1 s each."""
    for number in range(num_served, num_served + 40):
        backlog = Backlog(
            4, 400, 400, num_served=number, num_served_tokens=100 * number,
            busy_s=max(number - 39, 0) * 0.1,
        )  # fmt: skip
        forecast = forecast.after(QueueChanged(node="sort", backlog=backlog), 0.0)
    return forecast


class Corrected:
    """A forecast under an objective; four requests wait."""

    def __init__(self, objective_s: float | None) -> None:
        learnt = learned(*[(100, 1.0)] * 20)
        self._forecast = waiting(waiting(replace(learnt, objective_s=objective_s)), 40)

    def see(self, since_arrival_s: float | None, slo_ttft_s: float | None) -> None:
        first = FirstToken(seconds=1.0, since_arrival_s=since_arrival_s, slo_ttft_s=slo_ttft_s)
        self._forecast = self._forecast.after(first, 0.0)

    @property
    def wait_s(self) -> float:
        ttft_s = self._forecast.ttft_s(ask(100), 0.0)
        assert ttft_s is not None
        return ttft_s - 1.0


def test_ttft_adds_what_was_waited_the_queue_and_the_first_token() -> None:
    forecast = waiting(learned(*[(100, 1.0)] * 20))
    # No time has passed: the four waiting prompts take the time of their prefills.
    assert forecast.ttft_s(ask(100), 0.0) == pytest.approx(4.0 + 1.0)
    assert replace(forecast, num_engines=2).ttft_s(ask(100), 0.0) == pytest.approx(2.0 + 1.0)
    assert waiting(Forecast()).ttft_s(ask(100), 0.0) is None  # no prefill was measured either
    forecast = waiting(forecast, 40)
    wait_s = forecast.pace.long_wait_s(3.0)
    assert wait_s is not None
    assert forecast.ttft_s(ask(100, arrived_s=1.0), 3.0) == pytest.approx(2.0 + wait_s + 1.0)


def test_late_first_tokens_make_predicted_waits_longer_and_others_shorter_again() -> None:
    forecast = Corrected(objective_s=2.0)
    right_s = forecast.wait_s
    for since_s, times in ((None, 1.0), (1.9, 1.0), (2.1, 1.25), (1.9, 1.25 * 0.995)):
        forecast.see(since_s, 2.0)
        assert forecast.wait_s == pytest.approx(times * right_s)
    for since_s, times in ((2.1, 4.0), (1.9, 1.0)):
        for _ in range(300):
            forecast.see(since_s, 2.0)
        assert forecast.wait_s == pytest.approx(times * right_s)


@pytest.mark.parametrize("objective_s", [2.0, None])
def test_objectives_that_clients_choose_correct_nothing(objective_s: float | None) -> None:
    forecast = Corrected(objective_s)
    right_s = forecast.wait_s
    for since_s, slo_ttft_s in ((0.5, 0.001), (50.0, 40.0), (9.0, None)):
        forecast.see(since_s, slo_ttft_s)
        assert forecast.wait_s == right_s


def test_steps_are_timed_while_a_replica_is_busy() -> None:
    forecast = Forecast()
    for now, num_steps, num_running in ((0.0, 1, 2), (0.2, 3, 0), (9.0, 4, 1), (9.1, 5, 1)):
        load = EngineLoad(num_running=num_running, num_steps=num_steps)
        forecast = forecast.after(LoadReported(node="g", replica=0, load=load), now)
    assert forecast.step_s == pytest.approx(0.1)


SAMPLES = st.lists(
    st.tuples(st.integers(0, 10_000), st.floats(0, 100, allow_subnormal=False)), min_size=1
)


def fitted(*samples: tuple[float, float]) -> LineFit:
    fit = LineFit()
    for num_tokens, seconds in samples:
        fit = fit.with_samples(num_tokens, seconds)
    return fit


def test_samples_on_a_line_give_that_line() -> None:
    fit = fitted((0, 1.0), (100, 2.0), (200, 3.0))
    assert fit.seconds_of(300) == pytest.approx(4.0)
    assert fit.seconds_of(300, 2) == pytest.approx(2 * 1.0 + 3.0)


def test_samples_of_one_size_are_proportional() -> None:
    fit = fitted((100, 1.0), (101, 3.0))
    assert fit.seconds_of(50) == pytest.approx(1.0, rel=0.02)


def test_what_takes_no_longer_with_more_tokens_is_flat() -> None:
    fit = fitted(*[(10, 0.3), (1000, 0.2)] * 8)
    assert fit.seconds_of(0) == fit.seconds_of(5000) == pytest.approx(0.25)


def test_equal_samples_may_come_together() -> None:
    assert LineFit().with_samples(30, 6.0, count=3) == fitted(*[(10, 2.0)] * 3)


def test_older_samples_count_less() -> None:
    fit = fitted((10, 5.0)).with_samples(10, 1.0, kept=0.0)
    assert fit.seconds_of(10) == pytest.approx(1.0)


@given(SAMPLES, st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_line_never_falls_and_is_never_negative(
    samples: list[tuple[int, float]], one: int, other: int
) -> None:
    fit = fitted(*samples)
    low, high = sorted((one, other))
    assert -1e-6 <= fit.seconds_of(low) <= fit.seconds_of(high) + 1e-6


def load_of(num_steps: int, num_running: int) -> LoadReported:
    return LoadReported(load=EngineLoad(num_running=num_running, num_steps=num_steps))


def test_the_steps_of_a_replica_are_measured_by_its_batch() -> None:
    """10 ms with one sequence, 1 ms more with each further one."""
    speed, now = ReplicaSpeed(), 0.0
    for report in range(40):
        num_running = 1 + report % 8
        speed = speed.after(load_of(10 * report, num_running), now)
        now += 10 * (0.009 + 0.001 * (1 + (report + 1) % 8))
    assert speed.step_s(1) == pytest.approx(0.010)
    assert speed.step_s(32) == pytest.approx(0.041)


def test_equal_batches_say_nothing_of_other_batches() -> None:
    speed = ReplicaSpeed().after(load_of(10, 4), 1.0).after(load_of(20, 4), 1.2)
    assert speed.step_s(4) == speed.step_s(32) == pytest.approx(0.02)


def test_idle_time_is_no_step_time() -> None:
    speed = ReplicaSpeed().after(load_of(10, 0), 1.0)
    assert speed.after(load_of(20, 1), 9.0).step_s(1) is None


def test_a_replica_is_known_after_its_first_measurement() -> None:
    speed = ReplicaSpeed()
    assert not speed.is_known
    assert speed.prefill_s(10) is None
    first = FirstToken(seconds=0.4, num_computed_tokens=100, computed_s=0.2)
    measured = speed.after(first, 7.0)
    assert measured.is_known
    assert measured.prefill_s(50) == pytest.approx(0.1)
    assert (measured.first_token_s, measured.measured_s) == (0.4, 7.0)
