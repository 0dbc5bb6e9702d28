from typing import Any

import pytest
from immutables import Map

from sagellm.operators.admission import AdmissionOptions, AdmissionState, build
from sagellm.runtime.feedback import Backlog, CreditChanged, FirstToken, QueueChanged
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Emit, Setup, Signal, Terminate
from sagellm.runtime.sampling import Sampling


def waiting(number: int, sequence: int = 1) -> Any:
    return QueueChanged(node="sort", sequence=sequence, backlog=Backlog(num_requests=number))


def test_a_request_enters_while_there_is_room(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued=2), Setup("admission")))
    request = Request(request_id="r")
    assert admission(Arrival(request)) == (Emit(request),)
    admission(waiting(1))
    assert admission(Arrival(request)) == (Emit(request),)


def test_a_full_queue_refuses_and_says_what_to_do(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued=2), Setup("door")))
    admission(waiting(2))
    (output,) = admission(Arrival(Request(request_id="r", choice=1)))
    assert isinstance(output, Terminate)
    assert output.event.key == ("r", 1)
    assert output.event.finish_reason == "refused"
    assert "door" in output.event.error
    assert "max_queued=2" in output.event.error


def test_room_that_is_told_of_admits_again(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued=1), Setup("admission")))
    admission(waiting(1, 1))
    admission(waiting(0, 2))
    (output,) = admission(Arrival(Request(request_id="r")))
    assert isinstance(output, Emit)


def test_an_expired_request_does_not_enter(running: Any) -> None:
    admission = running(build(AdmissionOptions(), Setup("admission")))
    (output,) = admission(Arrival(Request(request_id="r", expires_s=5.0)), 5.0)
    assert output.event.finish_reason == "expired"
    assert output.event.stamps.finished_s == 5.0


def test_other_feedback_changes_nothing(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued=1), Setup("admission")))
    assert admission(CreditChanged(node="decode", num_left=1.0)) == ()
    assert admission.state == AdmissionState()


# ---- bounds, predictions, priorities -------------------------------------------------------------

ROOMY = AdmissionOptions(max_queued=10_000, slo_ttft_s=1.0)


def told(num_requests: int, **fields: Any) -> Any:
    return QueueChanged(
        node="sort", sequence=1, backlog=Backlog(num_requests=num_requests, **fields)
    )


MARGIN = 1.15  # of a wait for 400 requests


def served(num_prompt_tokens: float) -> Any:
    """400 requests in a queue that has served 1000 prompt tokens a second for two busy seconds."""
    return told(
        400,
        num_prompt_tokens=int(num_prompt_tokens),
        num_served=20,
        num_served_tokens=2000,
        busy_s=2.0,
    )


def asked(**fields: Any) -> Any:
    return Arrival(Request(**{"request_id": "r", **fields}))


def code_of(outputs: Any) -> str:
    (output,) = outputs
    return output.event.code if isinstance(output, Terminate) else ""


def test_tokens_that_wait_are_bounded(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued_tokens=1000), Setup("door")))
    sampling = Sampling(max_tokens=50)
    admission(told(3, num_tokens=700))
    assert code_of(admission(asked(prompt_token_ids=(1,) * 50, sampling=sampling))) == ""
    (output,) = admission(asked(prompt_token_ids=(1,) * 51, sampling=sampling))
    assert output.event.code == "queue_full"
    assert "max_queued_tokens=1000" in output.event.error


def test_what_waits_for_nothing_enters(running: Any) -> None:
    admission = running(
        build(AdmissionOptions(max_queued_tokens=10, slo_ttft_s=0.01), Setup("door"))
    )
    admission(FirstToken(node="generate", seconds=9.0))
    assert code_of(admission(asked(prompt_token_ids=(1,) * 500))) == ""


def test_a_first_token_that_would_come_too_late_is_refused(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    admission(served(690))
    assert code_of(admission(asked())) == ""
    admission(served(900))
    (output,) = admission(asked())
    assert output.event.code == "slo_unreachable"
    assert output.event.retry_after_s == pytest.approx(0.9)
    assert "1.0 s" in output.event.error


def test_a_request_may_bring_its_own_objective(running: Any) -> None:
    admission = running(build(AdmissionOptions(), Setup("door")))
    admission(served(900))
    assert code_of(admission(asked())) == ""
    assert code_of(admission(asked(slo_ttft_s=1.0))) == "slo_unreachable"
    assert code_of(admission(asked(slo_ttft_s=2.0))) == ""


def test_the_default_objective_goes_with_the_request(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    (output,) = admission(asked())
    assert output.item.slo_ttft_s == 1.0
    (output,) = admission(asked(slo_ttft_s=3.0))
    assert output.item.slo_ttft_s == 3.0


def test_time_that_has_passed_and_the_first_token_count(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    admission(served(400), 9.2)
    late = asked(stamps=Stamps(arrived_s=9.0))
    assert code_of(admission(late, 9.2)) == ""
    assert code_of(admission(late, 9.4)) == "slo_unreachable"
    admission(FirstToken(node="generate", seconds=0.4))
    assert code_of(admission(late, 9.0)) == "slo_unreachable"


def test_first_tokens_later_than_the_objective_make_it_stricter(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    admission(served(600))
    assert code_of(admission(asked())) == ""
    admission(FirstToken(node="generate", seconds=0.01, since_arrival_s=1.1, slo_ttft_s=1.0))
    assert code_of(admission(asked())) == "slo_unreachable"


def test_without_evidence_nothing_is_predicted(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    fields = {"num_prompt_tokens": 10**6, "num_served": 7, "num_served_tokens": 70, "busy_s": 9.0}
    admission(told(400, **fields))
    assert code_of(admission(asked())) == ""
    admission(told(400, **{**fields, "num_served": 8}))
    assert code_of(admission(asked())) == "slo_unreachable"


def test_the_rate_follows_the_load(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    admission(served(900))
    assert code_of(admission(asked())) == "slo_unreachable"
    fields = {"num_prompt_tokens": 900, "num_served": 3020, "num_served_tokens": 302_000}
    admission(told(400, **fields, busy_s=32.0))  # ten times as fast, for half a minute
    assert code_of(admission(asked())) == ""


@pytest.mark.parametrize(("priority", "limit"), list(enumerate((100, 90, 80, 60, 40))))
def test_the_less_urgent_are_refused_first(running: Any, priority: int, limit: int) -> None:
    admission = running(build(AdmissionOptions(max_queued=100), Setup("door")))
    admission(waiting(limit - 1))
    assert code_of(admission(asked(priority=priority))) == ""
    admission(waiting(limit))
    assert code_of(admission(asked(priority=priority))) == "queue_full"
    roomy = running(build(ROOMY, Setup("door")))
    roomy(served(limit * 10 / MARGIN - 5))
    assert code_of(roomy(asked(priority=priority))) == ""
    roomy(served(limit * 10 / MARGIN + 5))
    assert code_of(roomy(asked(priority=priority))) == "slo_unreachable"


@pytest.mark.parametrize(("num_waiting", "code"), [(7, "queue_full"), (4, "")])
def test_choices_enter_together_or_not_at_all(running: Any, num_waiting: int, code: str) -> None:
    admission = running(build(AdmissionOptions(max_queued=10), Setup("door")))
    admission(waiting(num_waiting))
    for choice in range(4):
        outputs = admission(asked(choice=choice, sampling=Sampling(n=4)))
        assert code_of(outputs) == code
        admission(waiting(num_waiting + choice + 1 if not code else 0))
    assert admission.state.verdicts == Map()


def test_a_request_that_ends_early_leaves_no_verdict(running: Any) -> None:
    admission = running(build(AdmissionOptions(), Setup("door")))
    admission(asked(sampling=Sampling(n=4)))
    assert len(admission.state.verdicts) == 1
    admission(Signal("forget", "r"))
    assert admission.state.verdicts == Map()


def test_equal_inputs_give_equal_answers(running: Any) -> None:
    def run() -> Any:
        admission = running(build(ROOMY, Setup("door")))
        inputs = [served(700), asked(), FirstToken(node="g", seconds=0.2), asked()]
        return [admission(happened, float(at)) for at, happened in enumerate(inputs)]

    assert run() == run()


def test_a_silence_between_two_departures_is_not_the_end_of_all_service(running: Any) -> None:
    """A request of 1000 tokens leaves once a minute, while others arrive all the time."""
    admission = running(build(AdmissionOptions(slo_ttft_s=400.0), Setup("door")))

    def told_at(seconds: float) -> None:
        num_served = int(seconds // 60)
        admission(
            told(
                1,
                num_prompt_tokens=1000,
                num_served=num_served,
                num_served_tokens=1000 * num_served,
                busy_s=seconds,
            )
        )

    waits = []
    for seconds in range(0, 1200, 5):
        told_at(seconds)
        waits.append(admission.state.forecast.pace.wait_s(0.0))
    assert all(60 <= wait <= 75 for wait in waits[-12:])


def give_bursts(admission: Any) -> None:
    """Every 4 seconds 16 requests leave an engine, half of them a step later, which is full then.
    The last of five bursts leaves at 20.05 s.
    """
    for number in range(16 * 5):
        seconds = 4.0 * (1 + number // 16) + 0.05 * (number % 16 >= 8)
        counts = {"num_served": number + 1, "num_served_tokens": 50 * (number + 1)}
        admission(told(0, num_full=1, busy_s=seconds, **counts), seconds)


@pytest.mark.parametrize(("silence_s", "code"), [(0.1, "slo_unreachable"), (3.0, "")])
def test_answers_that_end_together_leave_a_long_silence_behind(
    running: Any, silence_s: float, code: str
) -> None:
    admission = running(build(AdmissionOptions(slo_ttft_s=2.0), Setup("door")))
    give_bursts(admission)
    now = 20.05 + silence_s
    assert code_of(admission(asked(stamps=Stamps(arrived_s=now)), now)) == code


def test_a_full_engine_and_an_empty_queue_refuse_what_would_come_too_late(running: Any) -> None:
    """A queue without waiting requests or full engines refuses nothing."""
    admission = running(build(AdmissionOptions(slo_ttft_s=2.0), Setup("door")))
    give_bursts(admission)
    newcomer = asked(stamps=Stamps(arrived_s=20.1))
    assert code_of(admission(newcomer, 20.1)) == "slo_unreachable"
    admission(told(0, num_served=80, num_served_tokens=4000, busy_s=20.1), 20.1)
    assert code_of(admission(newcomer, 20.1)) == ""


def test_after_a_long_silence_a_retry_makes_sense_within_as_long(running: Any) -> None:
    admission = running(build(ROOMY, Setup("door")))
    admission(served(900))
    for busy_s in range(3, 3600):
        admission(
            told(400, num_prompt_tokens=900, num_served=20, num_served_tokens=2000, busy_s=busy_s)
        )
    (output,) = admission(asked())
    assert 1 <= output.event.retry_after_s <= 3600


def test_several_queues_count_together(running: Any) -> None:
    admission = running(build(AdmissionOptions(max_queued=10), Setup("door")))

    def tell(node: str, num_requests: int, busy_s: float) -> None:
        backlog = Backlog(num_requests=num_requests, num_served=8, busy_s=busy_s)
        admission(QueueChanged(node=node, backlog=backlog))

    tell("long", 8, 10_000.0)
    tell("short", 0, 1.0)
    assert code_of(admission(asked(priority=0))) == ""
    tell("short", 2, 2.0)
    assert code_of(admission(asked(priority=0))) == "queue_full"
    tell("long", 0, 10_001.0)
    assert code_of(admission(asked(priority=0))) == ""
