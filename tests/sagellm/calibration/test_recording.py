"""Steps and requests of a real engine, recorded."""

import pytest

from sagellm import Graph, Sampling
from sagellm.calibration.recording import RECORDED, RecordedEngine, StepLog, recorded_kind
from sagellm.runtime.engine.step_cost import StepShape

SHAPE = StepShape(0, 0, 1, 10)


class FakeBatch:
    """A batch of sequences with these keys."""

    def __init__(self, *keys):
        self.sequences = [
            type("Sequence", (), {"state": type("State", (), {"key": key})}) for key in keys
        ]


def recorded(*steps, submitted):
    log = StepLog(submitted_s=submitted)
    for keys, launched_s, ended_s in steps:
        log.record(FakeBatch(*keys), SHAPE, launched_s, ended_s)
    return [step.seconds for step in log.steps], log


def test_a_step_of_an_idle_engine_begins_with_its_launch():
    found, _ = recorded(("a", 1.0, 1.5), ("b", 4.0, 4.25), submitted={"a": 0.9, "b": 3.0})
    assert found == [0.5, 0.25]


def test_a_step_behind_another_has_the_time_between_them():
    """The sequence was there before the first step ended, though its step was launched later."""
    found, _ = recorded(("a", 1.0, 1.5), ("ab", 1.7, 2.0), submitted={"a": 0.9, "b": 1.2})
    assert found == [0.5, 0.5]


def test_a_step_that_was_launched_early_begins_with_the_end_of_the_other():
    found, _ = recorded(("a", 1.0, 1.5), ("a", 1.1, 1.8), submitted={"a": 0.9})
    assert found == [0.5, pytest.approx(0.3)]


def test_the_step_before_a_time_is_found():
    _, log = recorded(("a", 1.0, 1.5), ("a", 1.1, 1.8), submitted={"a": 0.9})
    assert log.step_before(1.79).ended_s == 1.5
    assert log.step_before(1.8).ended_s == 1.8
    assert [len(log.take()), len(log.take())] == [2, 0]


@pytest.mark.in_process
async def test_an_engine_in_a_session_records_every_token():
    options = {"g.kind": RECORDED, "g.threads": 1, "g.num_blocks": 64, "g.max_model_len": 256}
    with recorded_kind():
        async with Graph.load("joint").open(set=options) as session:
            (engine,) = session.executor.engines["g"]
            assert isinstance(engine, RecordedEngine)
            sampling = Sampling(max_tokens=8, ignore_eos=True)
            answer = await session.generate([1, 2, 3, 4, 5], sampling=sampling)
    shapes = [step.shape for step in engine.log.steps]
    assert len(answer.token_ids) == 8
    assert shapes[0] == StepShape(5, 15, 0, 5, 1, 5)
    assert shapes[1:] == [StepShape(0, 0, 1, context) for context in range(6, 13)]
    assert all(step.seconds > 0 for step in engine.log.steps)
