"""What operators that run engines report of a first token."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.handover import report_first_token
from sagellm.runtime.messages import Request, Stamps, TokenEvent


@dataclass
class Reports:
    """The context of an operator: its time, and what it reports."""

    time_s: float
    made: list[FirstToken] = field(default_factory=list)

    def now(self) -> float:
        return self.time_s

    def report(self, feedback: FirstToken) -> None:
        self.made.append(feedback)


def reported(now: float, **fields: Any) -> FirstToken:
    """The first token of a request that arrived at 1 s, left its queue at 2 s, and got it `now`."""
    ctx, stamps = Reports(now), Stamps(arrived_s=1.0, dispatched_s=2.0)
    request = Request(request_id="r", prompt_token_ids=(1,) * 8, stamps=stamps, **fields)
    event = TokenEvent(request_id="r", position=request.num_emitted, token_ids=(7,))
    report_first_token(ctx, request, event)  # type: ignore[arg-type]
    (first,) = ctx.made
    return first


def test_a_first_token_is_timed_from_when_its_request_left_the_queue() -> None:
    assert reported(2.5).seconds == pytest.approx(0.5)


def test_it_is_late_where_more_has_passed_since_the_arrival_than_the_objective() -> None:
    assert reported(2.9, slo_ttft_s=2.0).is_late is False
    assert reported(3.1, slo_ttft_s=2.0).is_late is True


def test_without_an_objective_or_after_a_part_of_the_answer_nothing_is_late() -> None:
    assert reported(9.0).is_late is None
    assert reported(9.0, slo_ttft_s=2.0, emitted_token_ids=(5,)).is_late is None
