"""Reports of first tokens, and the phases of a request."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.handover import Phases, phases_of, report_first_token
from sagellm.runtime.messages import Request, Stamps, TokenEvent


@dataclass
class Reports:
    """The context of an operator, with its time and its reports."""

    time_s: float
    made: list[FirstToken] = field(default_factory=list)

    def now(self) -> float:
        return self.time_s

    def report(self, feedback: FirstToken) -> None:
        self.made.append(feedback)


def reported(now: float, **fields: Any) -> FirstToken:
    """Report the first token of a request that arrived at 1 s and left its queue at 2 s."""
    (first,) = reports(now, 2.0, **fields)
    return first


def reports(now: float, dispatched_s: float | None, **fields: Any) -> list[FirstToken]:
    ctx, stamps = Reports(now), Stamps(arrived_s=1.0, dispatched_s=dispatched_s)
    request = Request(request_id="r", prompt_token_ids=(1,) * 8, stamps=stamps, **fields)
    event = TokenEvent(request_id="r", position=request.num_emitted, token_ids=(7,))
    report_first_token(ctx, request, event)  # type: ignore[arg-type]
    return ctx.made


def test_a_first_token_is_timed_from_when_its_request_left_the_queue() -> None:
    assert reported(2.5).seconds == pytest.approx(0.5)


def test_it_is_timed_from_its_arrival_too_with_its_objective() -> None:
    first = reported(2.9, slo_ttft_s=2.0)
    assert first.since_arrival_s == pytest.approx(1.9)
    assert first.slo_ttft_s == 2.0


def test_after_a_part_of_the_answer_the_arrival_says_nothing() -> None:
    assert reported(9.0, slo_ttft_s=2.0, emitted_token_ids=(5,)).since_arrival_s is None


def test_without_a_queue_it_is_timed_from_its_arrival_once() -> None:
    (first,) = reports(2.5, None)
    assert first.seconds == pytest.approx(1.5)
    assert reports(9.0, None, epoch=1) == []  # it was lost with another engine


FULL = {"started_s": 2.0, "prefilled_s": 4.0, "transferred_s": 4.5, "finished_s": 9.0}


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        (FULL, (1.0, 2.0, 0.5, 4.5)),
        ({**FULL, "dispatched_s": 1.5}, (1.0, 2.0, 0.5, 4.5)),
        ({**FULL, "transferred_s": None}, (1.0, 2.0, 0.0, 5.0)),  # joint
        ({"dispatched_s": 1.5, "finished_s": 3.0}, (2.0, 0.0, 0.0, 0.0)),  # ended in a queue
        ({"started_s": 2.0, "finished_s": 3.0}, (1.0, 1.0, 0.0, 0.0)),  # ended in prefill
        ({}, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_phases_add_up_to_the_whole(passed: Any, expected: Any) -> None:
    stamps = Stamps(arrived_s=1.0, **passed)
    assert phases_of(stamps) == expected
    assert sum(expected) == (stamps.finished_s or 1.0) - 1.0


def test_phases_add() -> None:
    assert Phases(1, 2, 3, 4).plus(Phases(queue_s=1)) == (2, 2, 3, 4)
