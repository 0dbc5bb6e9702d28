"""route_model: each request leaves by the outlet of its model."""

from typing import Any

import pytest

from sagellm.operators.route_model import SPEC, RouteModelOptions, build
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Setup, Signal


def answered(running: Any, happened: Any) -> Any:
    return running(build(RouteModelOptions(("small", "large")), Setup("choose")))(happened)


@pytest.mark.parametrize(
    ("model", "outlet"), [("small", "small"), ("large", "large"), ("", "small")]
)
def test_a_request_goes_to_its_model_or_to_the_first(running: Any, model: str, outlet: str) -> None:
    request = Request(request_id="r", model=model)
    (emit,) = answered(running, Arrival(request))
    assert (emit.item, emit.outlet) == (request, outlet)


def test_another_model_is_refused_with_the_nearest(running: Any) -> None:
    (end,) = answered(running, Arrival(Request(request_id="r", model="smal")))
    assert (end.event.finish_reason, end.event.code) == ("refused", "bad_request")
    assert end.event.error == "no way leads to the model 'smal'; did you mean 'small'?"


def test_signals_pass_it_by(running: Any) -> None:
    assert answered(running, Signal("cancel", "r")) == ()


def test_its_outlets_are_those_that_its_options_list() -> None:
    spec = SPEC.with_options({"models": ("small", "large", "small")})
    assert [port.name for port in spec.outlets] == ["small", "large"]
