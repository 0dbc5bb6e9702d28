"""admission with limits of the requests in service, and requests that do not want to wait."""

from typing import Any

import pytest

from sagellm.operators.admission import AdmissionOptions, build
from sagellm.runtime.feedback import Backlog, FirstToken, LoadReported, QueueChanged
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Setup, Signal, Target, Terminate
from sagellm.runtime.port import EngineFacts, EngineLoad
from sagellm.runtime.sampling import Sampling

FACTS = {"d": EngineFacts("m", 4096, 10, num_blocks=100, block_size=16)}
TARGETS = (
    Target("prefill", 4, "p", True, frozenset({"out"}), op="prefill"),
    Target("decode", 1, "d", False, frozenset({"out"}), op="decode"),
)
SETUP = Setup("door", targets=TARGETS, facts=FACTS)


def asked(number: int, **fields: Any) -> Any:
    return Arrival(Request(**{"request_id": f"r{number}", "priority": 0, **fields}))


def refusal(outputs: Any) -> Any:
    (output,) = outputs
    return output.event if isinstance(output, Terminate) else None


def accepted(admission: Any, number: int, **fields: Any) -> bool:
    return refusal(admission(asked(number, **fields))) is None


def test_what_is_still_computed_counts_as_decode_load(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=0.5), SETUP))
    assert [accepted(admission, number) for number in range(6)] == [True] * 5 + [False]
    end = refusal(admission(asked(9)))
    assert (end.code, end.retry_after_s) == ("decode_full", 1.0)
    assert "max_decode_load=0.5" in end.error


def test_the_current_load_lacks_what_is_still_computed(running: Any) -> None:
    options = AdmissionOptions(max_decode_load=0.5, load_at="arrival")
    admission = running(build(options, SETUP))
    assert all(accepted(admission, number) for number in range(20))
    for number in range(5):
        admission(FirstToken(node="decode", seconds=1.0, request_id=f"r{number}"))
    assert not accepted(admission, 20)


def test_an_end_makes_room(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=0.5), SETUP))
    assert [accepted(admission, number) for number in range(6)][-1] is False
    assert admission.operator.keeps(admission.state, "r0")
    assert not admission.operator.keeps(admission.state, "r5")  # it was refused
    admission(Signal("forget", "r0"))
    assert accepted(admission, 7)


def test_kv_tokens_are_decode_load(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=0.5), SETUP))
    long = {"prompt_token_ids": (1,) * 600}
    assert accepted(admission, 0, **long)
    assert accepted(admission, 1, **long)
    assert not accepted(admission, 2, **long)  # 1,200 of 1,600 tokens


def test_the_less_urgent_have_a_smaller_share(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=1.0), SETUP))
    assert [accepted(admission, n, priority=4) for n in range(5)] == [True] * 4 + [False]
    assert [accepted(admission, n, priority=0) for n in range(5, 12)] == [True] * 6 + [False]


def test_a_tpot_objective_bounds_the_sequences(running: Any) -> None:
    admission = running(build(AdmissionOptions(slo_tpot_s=0.03), SETUP))
    now, num_steps = 0.0, 0
    for number in (1, 2, 4, 2):  # steps of 10 ms and 5 ms a sequence
        num_steps, now = num_steps + 10, now + 10 * (0.01 + 0.005 * number)
        load = EngineLoad(num_running=number, num_steps=num_steps)
        admission(LoadReported(node="decode", load=load), now)
        admission(LoadReported(node="prefill", load=load), now)  # of no interest
    assert [accepted(admission, number) for number in range(5)] == [True] * 4 + [False]
    end = refusal(admission(asked(9)))
    assert end.code == "slo_unreachable"
    assert "35.0 ms each, and the objective is 30 ms" in end.error


def test_an_idle_engine_takes_any_request(running: Any) -> None:
    """The objective is shorter than a step."""
    admission = running(build(AdmissionOptions(slo_tpot_s=0.001), SETUP))
    for number in range(1, 4):
        load = EngineLoad(num_running=number, num_steps=number)
        admission(LoadReported(node="decode", load=load), 0.1 * number)
    assert accepted(admission, 0)
    assert not accepted(admission, 1)


def test_choices_are_sequences_that_decode(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=0.5), SETUP))
    for choice in range(3):
        assert accepted(admission, 0, choice=choice, sampling=Sampling(n=3))
    assert not accepted(admission, 1, sampling=Sampling(n=3))
    assert accepted(admission, 2, sampling=Sampling(n=2))


def test_a_request_that_enters_again_is_not_judged(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_decode_load=0.1), SETUP))
    assert accepted(admission, 0)
    assert not accepted(admission, 1)
    assert accepted(admission, 0, epoch=1)


def test_adaptive_concurrency_refuses_above_its_limit(running: Any) -> None:
    options = AdmissionOptions(concurrency="adaptive", min_concurrency=4, slo_ttft_s=1.0)
    admission = running(build(options, SETUP))
    assert [accepted(admission, number) for number in range(5)] == [True] * 4 + [False]
    assert refusal(admission(asked(9))).code == "concurrency_limit"
    fields = {"seconds": 0.1, "since_arrival_s": 0.1, "slo_ttft_s": 1.0}
    admission(FirstToken(node="decode", request_id="r0", **fields))
    assert accepted(admission, 10)
    assert [accepted(admission, n, priority=4) for n in (11, 12)] == [False, False]


@pytest.mark.parametrize(
    ("backlog", "code"),
    [(Backlog(), ""), (Backlog(num_full=1), "would_wait"), (Backlog(num_requests=1), "would_wait")],
)
def test_a_request_that_will_not_wait_is_refused_where_it_would(
    running: Any, backlog: Backlog, code: str
) -> None:
    admission = running(build(AdmissionOptions(), SETUP))
    admission(QueueChanged(node="sort", backlog=backlog))
    end = refusal(admission(asked(0, no_queue=True)))
    assert (end.code if end else "") == code
    assert end is None or end.retry_after_s == 1.0
    assert accepted(admission, 1)
    assert accepted(admission, 2, no_queue=True, epoch=1)  # it was accepted before


def test_only_the_needed_feedback_is_subscribed_to() -> None:
    def wanted(**options: Any) -> set[str]:
        return set(build(AdmissionOptions(**options), SETUP).subscribes)

    assert wanted() == {"first_token", "queue"}
    assert wanted(slo_tpot_s=0.1) == {"first_token", "queue", "load", "health", "topology"}
    adaptive = {"concurrency": "adaptive", "slo_ttft_s": 1.0}
    assert wanted(**adaptive) == {"first_token", "queue", "cache"}


def busy(num_prompt_tokens: int) -> Any:
    """A queue that serves 1,000 prompt tokens a second, in which so many wait."""
    counts = {"num_served": 400, "num_served_tokens": 40_000, "busy_s": 40.0}
    backlog = Backlog(num_requests=400, num_prompt_tokens=num_prompt_tokens, **counts)
    return QueueChanged(node="sort", backlog=backlog)


def test_after_a_refusal_the_less_urgent_are_refused_for_two_seconds(running: Any) -> None:
    admission = running(build(AdmissionOptions(slo_ttft_s=1.0), SETUP))
    admission(busy(1200), 50.0)
    assert refusal(admission(asked(0), 50.0)).code == "slo_unreachable"
    admission(QueueChanged(node="sort", backlog=Backlog()), 50.1)
    end = refusal(admission(asked(1, priority=4), 51.9))
    assert (end.code, end.retry_after_s) == ("queue_full", 1.0)
    assert "more urgent requests are refused" in end.error
    assert refusal(admission(asked(2), 51.9)) is None
    assert refusal(admission(asked(3, priority=4), 52.1)) is None


def test_only_those_are_refused_whose_share_is_used_up_without_its_prompt(running: Any) -> None:
    """The waiting requests take half a second, the prompt of the refused request 0.7 s."""
    admission = running(build(AdmissionOptions(slo_ttft_s=1.0), SETUP))
    for _ in range(10):
        first = FirstToken(seconds=0.1, num_computed_tokens=100, computed_s=0.1)
        admission(first)
    admission(busy(450), 50.0)
    long = {"prompt_token_ids": (1,) * 700, "stamps": Stamps(arrived_s=50.0)}
    assert refusal(admission(asked(0, **long), 50.0)).code == "slo_unreachable"
    admission(QueueChanged(node="sort", backlog=Backlog()), 50.1)
    ends = [refusal(admission(asked(n, priority=n), 50.5)) for n in range(1, 5)]
    assert [end is None for end in ends] == [True, True, True, False]


def test_an_objective_of_its_own_sheds_nobody(running: Any) -> None:
    admission = running(build(AdmissionOptions(slo_ttft_s=1.0), SETUP))
    admission(busy(500), 50.0)
    assert refusal(admission(asked(0, slo_ttft_s=0.1), 50.0)).code == "slo_unreachable"
    admission(QueueChanged(node="sort", backlog=Backlog()), 50.1)
    assert refusal(admission(asked(1, priority=4), 50.2)) is None
