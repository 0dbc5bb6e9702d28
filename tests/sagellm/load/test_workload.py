from itertools import islice, pairwise

import pytest

from sagellm.load.workload import PlannedRequest, closed_loop, poisson, replay_trace, within

PLAIN = closed_loop(100, 10, 0.0, seed=0)


def test_lengths_are_those_that_are_asked_for() -> None:
    assert next(closed_loop(100, 10, 0.0, seed=0)) == PlannedRequest(0.0, 100, 10)


def test_lengths_spread_around_what_is_asked_for() -> None:
    lengths = [one.input_len for one in islice(closed_loop(100, 10, 0.5, seed=0), 2000)]
    assert min(lengths) == 50
    assert max(lengths) == 150
    assert sum(lengths) / len(lengths) == pytest.approx(100, rel=0.02)
    assert min(one.output_len for one in islice(closed_loop(1, 1, 1.0, seed=0), 50)) == 1


def test_poisson_arrivals_have_the_rate_and_the_spread_of_the_process() -> None:
    times = [one.at_s for one in islice(poisson(closed_loop(1, 1, 0, 0), 4.0, seed=0), 20_000)]
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    assert variance == pytest.approx(mean**2, rel=0.06)  # exponential: as large as its mean squared


def test_equal_seeds_are_equal_loads() -> None:
    def load(seed: int) -> list[PlannedRequest]:
        return list(islice(poisson(closed_loop(9, 9, 0.5, seed), 4.0, seed), 20))

    assert load(3) == load(3) != load(4)


def test_a_trace_is_replayed_faster_and_shorter() -> None:
    trace = [PlannedRequest(0.0, 10, 10), PlannedRequest(6.0, 1000, 200, (1, 2))]
    assert list(replay_trace(trace, speedup=2, max_input_len=600, max_output_len=50)) == [
        PlannedRequest(0.0, 10, 10),
        PlannedRequest(3.0, 600, 50, (1, 2)),
    ]
    assert list(replay_trace(trace)) == trace


def test_within_ends_at_its_time() -> None:
    assert len(list(within([PlannedRequest(at, 1, 1) for at in (0.0, 1.9, 2.0)], 2.0))) == 2
