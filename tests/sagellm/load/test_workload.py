from itertools import islice, pairwise
from pathlib import Path

import pytest

from sagellm.load.workload import (
    PlannedRequest,
    Replay,
    closed_loop,
    poisson,
    read_workload,
    replay_trace,
    within,
)

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


TRACE = [PlannedRequest(float(at_s), 100 + at_s, 10) for at_s in range(10)]


def times(replay: Replay) -> list[float]:
    return [one.at_s for one in replay.apply(TRACE)]


def test_a_window_begins_at_time_0() -> None:
    assert [one.input_len for one in Replay(start_s=3, end_s=6).apply(TRACE)] == [103, 104, 105]
    assert times(Replay(start_s=2.5, end_s=6)) == [0.5, 1.5, 2.5]


def test_every_third_request_of_the_window() -> None:
    assert times(Replay(start_s=1, every=3)) == [0.0, 3.0, 6.0]


def test_rounds_are_the_mean_gap_apart() -> None:
    assert times(Replay(end_s=3, repeat=2)) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert times(Replay(end_s=3, repeat=2, speedup=2)) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert times(Replay(start_s=50, repeat=2)) == []


def test_lengths_are_scaled_and_then_clipped() -> None:
    changes = Replay(scale_input_len=0.5, scale_output_len=3, max_input_len=450)
    found = changes.apply([PlannedRequest(0.0, 800, 7), PlannedRequest(1.0, 1000, 1)])
    assert [(one.input_len, one.output_len) for one in found] == [(400, 21), (450, 3)]
    (shortest,) = Replay(scale_input_len=0.001).apply([PlannedRequest(0.0, 3, 3)])
    assert shortest.input_len == 1


def test_a_scaled_prompt_shares_the_same_part() -> None:
    """Half of the first prompt is shared, before and after: 4 of 8 blocks, 2 of 4, 8 of 16."""
    pair = [PlannedRequest(0.0, 4096, 1, (0, 1, 2, 3, *own)) for own in ((4, 5, 6, 7), (8, 9))]

    def shared(scale: float) -> tuple[int, int]:
        first, second = (one.block_ids for one in Replay(scale_input_len=scale).apply(pair))
        num = sum(a == b for a, b in zip(first, second, strict=False))
        return num, len(first)

    assert [shared(scale) for scale in (1.0, 0.5, 0.25, 2.0)] == [(4, 8), (2, 4), (1, 2), (8, 16)]


def test_a_change_keeps_what_it_does_not_name() -> None:
    full = PlannedRequest(4.0, 700, 9, (4,), "ann", 1, 0.5, "small")
    (found,) = Replay(speedup=4).apply([full])
    assert found == PlannedRequest(1.0, 700, 9, (4,), "ann", 1, 0.5, "small")


def test_a_workload_is_a_file_or_synthetic(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"at_s": 0, "input_len": 3, "output_len": 4}\n')
    assert read_workload(str(path)) == [PlannedRequest(0.0, 3, 4)]
    assert read_workload("synthetic:arrivals=constant,rate=2,input=3,output=4,requests=2") == [
        PlannedRequest(0.0, 3, 4),
        PlannedRequest(0.5, 3, 4),
    ]
