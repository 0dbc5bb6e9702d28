from typing import Any

from sagellm.operators.admission import Options, build
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Emit, Feedback, Setup, Terminate


def waiting(number: int, sequence: int = 1) -> Any:
    return Feedback("sort", 0, sequence, "queue", number)


def test_a_request_enters_while_there_is_room(running: Any) -> None:
    admission = running(build(Options(max_queued=2), Setup("admission")))
    request = Request(request_id="r")
    assert admission(Arrival(request)) == (Emit(request),)
    admission(waiting(1))
    assert admission(Arrival(request)) == (Emit(request),)


def test_a_full_queue_refuses_and_says_what_to_do(running: Any) -> None:
    admission = running(build(Options(max_queued=2), Setup("door")))
    admission(waiting(2))
    (output,) = admission(Arrival(Request(request_id="r", choice=1)))
    assert isinstance(output, Terminate)
    assert output.event.key == ("r", 1)
    assert output.event.finish_reason == "refused"
    assert "door" in output.event.error
    assert "max_queued=2" in output.event.error


def test_room_that_is_told_of_admits_again(running: Any) -> None:
    admission = running(build(Options(max_queued=1), Setup("admission")))
    admission(waiting(1, 1))
    admission(waiting(0, 2))
    (output,) = admission(Arrival(Request(request_id="r")))
    assert isinstance(output, Emit)


def test_an_expired_request_does_not_enter(running: Any) -> None:
    admission = running(build(Options(), Setup("admission")))
    (output,) = admission(Arrival(Request(request_id="r", expires_s=5.0)), 5.0)
    assert output.event.finish_reason == "expired"
    assert output.event.stamps.finished_s == 5.0


def test_other_feedback_changes_nothing(running: Any) -> None:
    admission = running(build(Options(max_queued=1), Setup("admission")))
    assert admission(Feedback("decode", 0, 1, "credit")) == ()
    assert admission.state == 0
