from functools import partial
from typing import Any

import msgspec
import pytest

from sagellm.runtime.messages import Answer, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Setup
from sagellm.runtime.sampling import Sampling
from sagellm.runtime.user_code import WrongResult
from sagellm.runtime.user_function import UserFunction, apply_result, end_event, find_function

FUNCTION = UserFunction("m", "f", str)
FIRST = TokenEvent(request_id="r", choice=1, epoch=2, position=4, token_ids=(7,))
REQUEST = Request(
    request_id="r", choice=1, epoch=2, prompt_token_ids=(1, 2), emitted_token_ids=(3,)
)


@pytest.mark.parametrize(
    ("item", "position"),
    [
        (REQUEST, 1),
        (FIRST, 5),
        (Prefilled(request=REQUEST, first=FIRST), 5),
        (Answer(request_id="r", choice=1, token_ids=(1, 2)), 2),
    ],
)
def test_an_ending_continues_where_the_item_stopped(item: Any, position: int) -> None:
    event = end_event(item, "failed", now=3.0, error="why")
    assert event.key == ("r", 1)
    assert event.position == position
    assert (event.finish_reason, event.error, event.stamps.finished_s) == ("failed", "why", 3.0)


def test_an_unknown_function_has_a_hint() -> None:
    setup = Setup("m", functions={"rewrite": str})
    with pytest.raises(ValueError, match="did you mean rewrite"):
        find_function(setup, "rewrit")
    with pytest.raises(ValueError, match="register it before"):
        find_function(setup, "x")


def test_async_is_seen_through_partial_and_call() -> None:
    async def later(a: Any, b: Any) -> Any:
        return a

    class Callable:
        async def __call__(self, item: Any) -> Any:
            return item

    functions = {"partial": partial(later, 1), "object": Callable(), "plain": str}
    setup = Setup("m", functions=functions)
    assert [find_function(setup, name).is_async for name in functions] == [True, True, False]


def test_without_a_model_there_are_no_ids_to_make() -> None:
    assert apply_result(FUNCTION, REQUEST, "new", None).prompt_token_ids == ()


def test_the_number_of_choices_is_not_the_functions_to_change() -> None:
    other = Request(request_id="r", sampling=REQUEST.sampling.__class__(n=5, max_tokens=3))
    sampling = apply_result(FUNCTION, REQUEST, other, None).sampling
    assert (sampling.n, sampling.max_tokens) == (1, 3)


def test_what_no_function_takes_is_refused() -> None:
    with pytest.raises(TypeError, match="Prefilled"):
        apply_result(FUNCTION, Prefilled(request=REQUEST, first=FIRST), "text", None)


def test_a_rewritten_request_keeps_what_belongs_to_the_session():
    item = Request(
        request_id="r",
        prompt="a",
        prompt_token_ids=(1,),
        sampling=Sampling(seed=7),
        expires_s=9.0,
        placement={"decode": 1},
    )
    changed = apply_result(
        FUNCTION, item, Request(request_id="x", prompt="a", sampling=Sampling(top_p=0.5)), None
    )
    assert (changed.request_id, changed.expires_s, changed.placement) == ("r", 9.0, {"decode": 1})
    assert (changed.sampling.seed, changed.sampling.top_p) == (7, 0.5)


def test_a_rewritten_request_has_valid_sampling():
    item = Request(request_id="r", prompt="a", prompt_token_ids=(1,))
    with pytest.raises(WrongResult, match="top_p"):
        apply_result(FUNCTION, item, Request(request_id="r", sampling=Sampling(top_p=3.0)), None)


def test_what_a_router_took_for_cached_is_not_said_of_a_request_that_ends() -> None:
    cached = msgspec.structs.replace(REQUEST, num_cached_tokens=1)
    assert end_event(cached, "cancelled", now=3.0).num_cached_tokens == 0


def test_other_tokens_are_not_cached() -> None:
    cached = msgspec.structs.replace(REQUEST, num_cached_tokens=1)
    other = msgspec.structs.replace(cached, prompt_token_ids=(8, 9))
    changed: Any = apply_result(FUNCTION, cached, other, None)
    assert (changed.prompt_token_ids, changed.num_cached_tokens) == ((8, 9), 0)
    same: Any = apply_result(FUNCTION, cached, msgspec.structs.replace(cached, priority=0), None)
    assert same.num_cached_tokens == 1
