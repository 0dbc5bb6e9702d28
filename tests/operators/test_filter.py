from typing import Any

import pytest

from sagellm.operators.filter import FilterOptions, build
from sagellm.runtime.messages import Answer, Request, TokenEvent
from sagellm.runtime.operator import Arrival, Emit, Setup, Terminate


def sieve(running: Any, function: Any, item: Any) -> Any:
    setup = Setup("guard", functions={"f": function})
    return running(build(FilterOptions("f"), setup))(Arrival(item), 2.0)


@pytest.mark.parametrize("kind", [Request, TokenEvent, Answer])
def test_yes_passes(running: Any, kind: Any) -> None:
    item = kind(request_id="r")
    assert sieve(running, lambda item: item.request_id == "r", item) == (Emit(item),)


@pytest.mark.parametrize("kind", [Request, Answer])
def test_no_ends_a_request_or_an_answer(running: Any, kind: Any) -> None:
    (output,) = sieve(running, lambda item: False, kind(request_id="r", choice=1))
    assert isinstance(output, Terminate)
    assert (output.event.key, output.event.finish_reason) == (("r", 1), "filtered")
    assert output.event.stamps.finished_s == 2.0


def test_tokens_that_do_not_pass_are_dropped(running: Any) -> None:
    assert sieve(running, lambda item: False, TokenEvent(request_id="r", text="a")) == ()


def test_the_last_event_passes_without_its_tokens(running: Any) -> None:
    last = TokenEvent(request_id="r", token_ids=(1,), text="a", finish_reason="stop")
    (output,) = sieve(running, lambda item: False, last)
    assert output == Emit(TokenEvent(request_id="r", finish_reason="stop"))


def test_a_function_that_raises_fails_the_request(running: Any) -> None:
    (output,) = sieve(running, lambda item: 1 / 0, TokenEvent(request_id="r", token_ids=(1,)))
    assert output.event.finish_reason == "failed"
    assert output.event.error == "guard: the function f raised ZeroDivisionError"
    assert output.event.position == 1


def test_an_async_function_is_refused() -> None:
    async def later(item: Any) -> Any:
        return True

    with pytest.raises(ValueError, match=r"guard: f is async, which only map can call"):
        build(FilterOptions("f"), Setup("guard", functions={"f": later}))
