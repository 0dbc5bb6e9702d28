"""The decode load at a later time: who counts, until when, and what is learned."""

import math

import pytest

from sagellm.runtime.decode_load import DecodeLoad, MeasuredSteps, UpReplicas
from sagellm.runtime.feedback import HealthChanged, LoadReported, Topology
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.operator import Target
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.sampling import Sampling


def asked(request_id, *, max_tokens=100, prompt=10, n=1):
    sampling = Sampling(max_tokens=max_tokens, n=n)
    return Request(request_id=request_id, prompt_token_ids=(1,) * prompt, sampling=sampling)


def learned(seconds_per_token=0.1, load=None):
    """A load that has seen ten answers of 50 to 140 tokens."""
    load = load or DecodeLoad()
    for number in range(10):
        max_tokens, name = 50 + 10 * number, f"old{number}"
        load = load.admitted(asked(name, max_tokens=max_tokens), 0.0).begun(name, 0.0)
        load = load.ended(name, seconds_per_token * max_tokens)
    return load


def test_a_request_counts_until_its_predicted_end():
    load = learned().admitted(asked("r"), 5.0)  # first token at 5 s, last one at 15 s
    assert load.at(4.0, 1.0).num_sequences == 1  # its prompt is computed, and it will decode
    assert load.at(14.9, 1.0).num_sequences == 1
    assert load.at(15.1, 1.0).num_sequences == 0


def test_the_measured_first_token_replaces_the_predicted_one():
    load = learned().admitted(asked("r"), 5.0).begun("r", 8.0)
    assert load.at(17.9, 8.0).num_sequences == 1
    assert load.at(18.1, 8.0).num_sequences == 0


def test_a_first_token_that_is_late_has_not_come():
    load = learned().admitted(asked("r"), 5.0)
    assert load.at(29.0, 20.0).num_sequences == 1
    assert load.at(31.0, 20.0).num_sequences == 0


def test_an_overdue_answer_counts_until_it_ends():
    load = learned().admitted(asked("r"), 0.0).begun("r", 0.0)
    assert load.at(20.0, 15.0).num_sequences == 1
    assert load.ended("r", 16.0).at(20.0, 16.0).num_sequences == 0


def test_before_eight_answers_every_request_counts_for_ever():
    load = DecodeLoad().admitted(asked("r"), 0.0).begun("r", 0.0)
    assert load.lasts_s(100) == math.inf
    assert load.at(1e9, 0.0).num_sequences == 1


def test_answers_that_end_early_are_learned():
    """Every answer takes 3 seconds, whatever its `max_tokens`."""
    load = DecodeLoad()
    for number in range(40):
        name = f"r{number}"
        load = load.admitted(asked(name, max_tokens=100 + 200 * (number % 5)), 0.0)
        load = load.begun(name, 0.0).ended(name, 3.0)
    assert load.lasts_s(100) == pytest.approx(3.0)
    assert load.lasts_s(900) == pytest.approx(3.0)


def test_a_request_that_ended_before_its_first_token_teaches_nothing():
    load = learned()
    after = load.admitted(asked("r"), 5.0).ended("r", 400.0)
    assert after.lasts_s(100) == load.lasts_s(100)
    assert after.num_open == 0


def test_the_tokens_grow_with_the_answer():
    load = learned().admitted(asked("r", prompt=1000), 0.0).begun("r", 0.0)
    assert load.at(5.0, 0.0).num_tokens == pytest.approx(1050)
    assert load.at(0.0, 0.0).num_tokens == pytest.approx(1000)


def test_choices_are_sequences_and_a_repeated_request_counts_once():
    load = learned().admitted(asked("r", n=3), 1.0)
    assert (load.num_open, load.at(1.0, 0.0).num_sequences) == (3, 3)
    assert load.admitted(asked("r", n=3), 2.0).num_open == 3


def test_the_current_load_has_only_what_decodes():
    load = learned().admitted(asked("a"), 1.0).admitted(asked("b"), 1.0).begun("b", 1.0)
    assert load.current.num_sequences == 1
    assert load.current.num_tokens == 10


def test_unknown_requests_change_nothing():
    load = learned()
    assert load.begun("x", 1.0) is load
    assert load.ended("x", 1.0) is load


# ---- steps and replicas --------------------------------------------------------------------------


def reports(numbers, *, base_s=0.01, row_s=0.001):
    """Ten steps with each number of running sequences."""
    times, now, num_steps = MeasuredSteps(), 0.0, 0
    for number in numbers:
        num_steps, now = num_steps + 10, now + 10 * (base_s + row_s * number)
        load = EngineLoad(num_running=number, num_steps=num_steps)
        times = times.after(LoadReported(node="d", load=load), now)
    return times


def test_step_times_follow_the_running_sequences():
    times = reports([5, 10, 20, 10, 40, 20])
    assert times.step_s(30) == pytest.approx(0.04)
    assert times.num_within(0.05) == pytest.approx(40)
    assert times.num_within(0.001) == 0


def test_equal_samples_give_a_cautious_bound():
    """20 sequences take 30 ms: 40 ms are not promised to more than a third more."""
    assert reports([20] * 5).num_within(0.04) == pytest.approx(20 * 4 / 3)


def test_the_time_of_an_idle_engine_is_no_step():
    idle = LoadReported(node="d", load=EngineLoad(num_running=0, num_steps=60))
    times = reports([5, 10, 20]).after(idle, 1.0)
    later = LoadReported(node="d", load=EngineLoad(num_running=5, num_steps=61))
    assert times.after(later, 500.0).step_s(10) == times.step_s(10)


def test_running_sequences_of_some_operators():
    load = LoadReported(node="p", load=EngineLoad(num_running=3, num_steps=1))
    times = reports([5, 7]).after(load, 9.0)
    assert times.num_running(frozenset({"d"})) == 7
    assert times.num_running(frozenset({"d", "p"})) == 10


def test_replicas_that_are_up():
    target, up = Target("d", 2, "e"), UpReplicas()
    assert up.count(target) == 2
    up = up.after(HealthChanged(node="d", replica=1, is_up=False))
    assert up.count(target) == 1
    up = up.after(Topology(1, {"e": 4}, frozenset({EngineReplica("e", 1)})))
    assert up.count(target) == 3  # lost and removed: it counts once
    assert up.after(HealthChanged(node="d", replica=1, is_up=True)).count(target) == 3
