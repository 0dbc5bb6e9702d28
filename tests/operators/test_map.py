from typing import Any

import msgspec
import pytest
import trio

from sagellm.operators.map import AsyncMap, MapOptions, build
from sagellm.runtime.messages import Answer, Request, TokenEvent
from sagellm.runtime.operator import Arrival, Emit, Setup


def encode(text: str, model: str = "") -> Any:
    return tuple(map(ord, text))


def mapped(running: Any, function: Any, item: Any) -> Any:
    setup = Setup("m", functions={"f": function}, encode=encode)
    (output,) = running(build(MapOptions("f"), setup))(Arrival(item))
    return output


def test_a_prompt_is_replaced_and_encoded_anew(running: Any) -> None:
    request = Request(request_id="r", prompt="a", prompt_token_ids=(1,), num_cached_tokens=1)
    item = mapped(running, lambda request: request.prompt + "b", request).item
    assert (item.prompt, item.prompt_token_ids, item.num_cached_tokens) == ("ab", (97, 98), 0)


def test_ids_that_the_function_made_stay(running: Any) -> None:
    made = Request(request_id="x", choice=9, prompt="z", prompt_token_ids=(7,), user_id="u")
    item = mapped(running, lambda request: made, Request(request_id="r", prompt="a")).item
    assert (item.key, item.prompt_token_ids, item.user_id) == (("r", 0), (7,), "u")


def test_tokens_keep_their_place_and_end(running: Any) -> None:
    last = TokenEvent(request_id="r", position=3, token_ids=(1,), text="a", finish_reason="stop")
    assert mapped(running, lambda event: event.text.upper(), last).item.text == "A"
    other = mapped(running, lambda event: TokenEvent(request_id="x", text="b"), last).item
    assert (other.key, other.position, other.finish_reason, other.text) == (
        ("r", 0),
        3,
        "stop",
        "b",
    )


def test_an_answer_becomes_any_value(running: Any) -> None:
    answer = Answer(request_id="r", text="4", token_ids=(1,))
    assert mapped(running, lambda answer: int(answer.text), answer).item.value == 4
    item = mapped(running, lambda answer: "four", answer).item
    assert (item.text, item.value, item.token_ids) == ("four", "four", (1,))
    changed = msgspec.structs.replace(answer, request_id="x", finish_reason="length")
    assert mapped(running, lambda answer: changed, answer).item.key == ("r", 0)


@pytest.mark.parametrize("item", [Request(request_id="r"), TokenEvent(request_id="r")])
def test_a_result_of_another_kind_fails_the_request(running: Any, item: Any) -> None:
    event = mapped(running, lambda item: 3, item).event
    assert event.finish_reason == "failed"
    wanted = {Request: "a prompt or a Request", TokenEvent: "a text or a TokenEvent"}[type(item)]
    said = f"m: the function f returned a value of type int; {wanted} was wanted"
    assert event.error == said


def test_the_text_of_an_error_stays_private(running: Any) -> None:
    def fail(item: Any) -> Any:
        raise RuntimeError("secret")

    assert "secret" not in mapped(running, fail, Request(request_id="r")).event.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MapOptions("g"), "m: unknown function 'g'"),
        (MapOptions("ff"), "did you mean f"),
        (MapOptions("f", concurrency=2), "not async"),
    ],
)
def test_mistakes_are_found_when_it_is_built(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(options, Setup("m", functions={"f": str}))


class Desk:
    """The part of a Context that AsyncMap uses."""

    name = "m"

    def __init__(self) -> None:
        self.sent = []

    def now(self) -> Any:
        return trio.current_time()

    async def emit(self, item: Any, outlet: str = "out") -> Any:
        self.sent.append(item)

    async def terminate(self, event: Any, cause: Any = None) -> Any:
        self.sent.append(event)


def async_map(function: Any, **options: Any) -> Any:
    setup = Setup("m", functions={"f": function}, encode=encode)
    operator = build(MapOptions("f", **options), setup)
    assert isinstance(operator, AsyncMap)
    return operator


async def test_calls_of_an_async_function_overlap(autojump_clock: Any) -> None:
    async def look_up(request: Any) -> Any:
        await trio.sleep(int(request.prompt))
        return "found"

    desk, operator = Desk(), async_map(look_up)
    async with trio.open_nursery() as nursery:
        for seconds in ("2", "1"):
            request = Request(request_id=seconds, prompt=seconds)
            nursery.start_soon(operator.on_item, desk, request)
    assert [item.request_id for item in desk.sent] == ["1", "2"]
    assert desk.sent[0].prompt_token_ids == encode("found")
    assert trio.current_time() == 2.0


async def test_an_async_function_that_raises_fails_its_request() -> None:
    async def fail(request: Any) -> Any:
        raise OSError("secret")

    desk = Desk()
    await async_map(fail).on_item(desk, Request(request_id="r"))
    assert desk.sent[0].error == "m: the function f raised OSError"


async def test_tokens_need_an_order_of_calls() -> None:
    async def upper(event: Any) -> Any:
        return event.text.upper()

    desk, event = Desk(), TokenEvent(request_id="r", text="a")
    await async_map(upper).on_item(desk, event)
    assert "set concurrency: 1" in desk.sent[0].error
    await async_map(upper, concurrency=1).on_item(desk, event)
    assert desk.sent[1].text == "A"


def test_credit_is_what_may_be_called_at_a_time() -> None:
    async def wait(item: Any) -> Any:
        return item

    assert async_map(wait, concurrency=3).capacity(None).requests == 3
    assert async_map(wait).holds is False


def test_a_callable_object_may_be_async() -> None:
    class Retriever:
        async def __call__(self, request: Any) -> Any:
            return request

    assert isinstance(async_map(Retriever()), AsyncMap)


def test_signals_pass_a_map_by(running: Any) -> None:
    assert mapped(running, lambda item: item, Request(request_id="r")) == Emit(
        Request(request_id="r")
    )
