"""What enters the graph of a call, and what the call holds while it is under way."""

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from gateway_calls import Client, event, gateway_before, last, playing, post
from starlette.requests import ClientDisconnect, Request

from sagellm.gateway.answers.writer import error_of
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.budgets import Budgets
from sagellm.gateway.http.endpoints import chat, completions, detokenize, invocations, tokenize
from sagellm.gateway.http.generation import samplings_of
from sagellm.gateway.protocol.bodies import read_completion
from sagellm.gateway.settings import Budget, RequestLimits, Settings
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.runtime.models.tokenizer import ByteTokenizer
from sagellm.session.requests import Encoded, Timing

COMPLETION = {"model": "m", "prompt": "hey"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hey"}]}
BOTH = pytest.mark.parametrize(("endpoint", "body"), [(completions, COMPLETION), (chat, CHAT)])


async def request_of(endpoint: Any, body: Any, **call: Any) -> GraphRequest:
    bridge = playing([last("a")])
    answered = await Client(body).call(endpoint, gateway_before(bridge), **call)
    assert answered.status == 200, answered.json
    return bridge.requests[0]


@BOTH
async def test_the_facts_of_the_call_go_with_it(endpoint, body):
    request = await request_of(
        endpoint,
        {**body, "priority": 4, "slo_ttft_s": 2.0, "timeout_s": 9.0, "no_queue": True, "seed": 5},
        tenant="acme",
        traceparent="00-a-b-01",
    )
    assert (request.user_id, request.model) == ("acme", "m")
    assert request.tags["traceparent"] == "00-a-b-01"
    assert (request.priority, request.slo_ttft_s, request.no_queue) == (4, 2.0, True)
    assert request.sampling.seed == 5


@BOTH
async def test_the_time_that_a_call_allows_goes_with_it(endpoint, body):
    bridge = playing([last("a")])
    await post(endpoint, bridge, {**body, "timeout_s": 9.0})
    assert bridge.timings == [Timing(timeout_s=9.0)]


@BOTH
async def test_unsaid_the_priority_is_normal(endpoint, body):
    assert (await request_of(endpoint, body)).priority == 2


async def test_a_text_prompt_enters_with_its_tokens():
    request = await request_of(completions, COMPLETION)
    assert (request.prompt, request.prompt_token_ids) == ("hey", tuple(b"hey"))


async def test_token_ids_enter_as_they_are():
    request = await request_of(completions, {"prompt": [104, 255]})
    assert (request.prompt, request.prompt_token_ids) == ("h\N{REPLACEMENT CHARACTER}", (104, 255))


async def test_a_conversation_enters_as_the_template_writes_it():
    request = await request_of(chat, CHAT)
    assert (request.prompt, request.prompt_token_ids) == ("user: hey\n", tuple(b"user: hey\n"))


async def test_a_truncated_prompt_enters_with_the_text_that_is_left():
    request = await request_of(completions, {**COMPLETION, "truncate_prompt_tokens": 2})
    assert (request.prompt, request.prompt_token_ids) == ("ey", tuple(b"ey"))
    request = await request_of(chat, {**CHAT, "truncate_prompt_tokens": 4})
    assert (request.prompt, request.prompt_token_ids) == ("hey\n", tuple(b"hey\n"))


@pytest.mark.parametrize("prompt", [[256], [[1], [256]]])
async def test_ids_that_the_model_does_not_know_are_refused(prompt):
    answered = await post(completions, playing(), {"prompt": prompt})
    assert answered.status == 400
    assert answered.json["error"]["param"] == "prompt"


class _Counting(ByteTokenizer):
    """How long the texts are that it encodes."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        self.lengths.append(len(text))
        return super().encode(text, add_special_tokens=add_special_tokens)


@BOTH
async def test_a_text_far_beyond_the_context_is_refused_by_its_beginning(endpoint, body):
    """To tokenise megabytes takes seconds and memory, for a 400."""
    tokenizer, text = _Counting(), "x" * 5_000_000
    said = {"prompt": text} if "prompt" in body else {"messages": [{**CHAT["messages"][0]}]}
    if "messages" in said:
        said["messages"][0]["content"] = text
    answered = await post(endpoint, playing(), said, tokenizer=tokenizer)
    assert answered.status == 400
    assert answered.json["error"]["code"] == "context_length_exceeded"
    assert (
        "more than 64 tokens; this model's maximum context length is 64"
        in answered.json["error"]["message"]
    )
    assert sum(tokenizer.lengths) < 5000


async def test_a_long_text_that_is_truncated_is_read_to_its_end():
    asked = {"prompt": "x" * 500_000 + "end", "truncate_prompt_tokens": 3}
    assert (await request_of(completions, asked)).prompt == "end"


async def test_a_long_text_of_few_tokens_is_not_refused():
    class Words(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
            return tuple(range(len(text) // 1000))

    bridge = playing([last("a")])
    answered = await post(completions, bridge, {"prompt": "x" * 20_000}, tokenizer=Words())
    assert answered.status == 200
    assert len(bridge.requests[0].prompt_token_ids) == 20


MANY = {
    "prompt": ["a" * (number % 5 + 1) for number in range(60)],
    "allowed_token_ids": [9, 5, 5],
    "bad_words": ["no"],
    "max_tokens": 2,
}


@pytest.mark.parametrize("asked", [2, None])
async def test_the_prompts_of_a_call_share_what_is_the_same_for_all(asked):
    """A call may allow 262,144 ids, and have 1,024 prompts."""
    bridge = playing([last("a")])
    body = {**MANY, "max_tokens": asked, "prompt": [*MANY["prompt"], "a" * 60]}
    await Client(body).call(completions, gateway_before(bridge))
    assert len({id(request.sampling.allowed_token_ids) for request in bridge.requests}) == 1
    assert bridge.requests[0].sampling.allowed_token_ids == (5, 9)
    found = {
        len(request.prompt_token_ids): request.sampling.max_tokens for request in bridge.requests
    }
    assert found == {length: asked or (4 if length == 60 else 16) for length in (1, 2, 3, 4, 5, 60)}


async def test_others_have_their_turn_between_the_samplings_of_a_call():
    gateway, asked = (
        gateway_before(playing()),
        read_completion(json.dumps(MANY).encode(), RequestLimits()),
    )
    prompts = [Encoded(text, tuple(text.encode())) for text in asked.prompts]
    num_turns = 0

    async def count_turns() -> None:
        nonlocal num_turns
        while True:
            await anyio.lowlevel.checkpoint()
            num_turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        await samplings_of(gateway.models[0], asked, prompts)
        tasks.cancel_scope.cancel()
    assert num_turns > len(prompts) / 2  # trio lets a task go twice now and then


async def test_a_later_prompt_that_leaves_no_room_is_refused():
    answered = await post(completions, playing(), {**MANY, "prompt": ["a", "a" * 63]})
    assert answered.status == 400
    assert "63 tokens and max_tokens is 2" in answered.json["error"]["message"]
    asked = {**MANY, "prompt": ["a", "a" * 60], "max_tokens": None, "min_tokens": 9}
    answered = await post(completions, playing(), asked)
    assert answered.json["error"]["message"] == "min_tokens: is 9, more than max_tokens (4)"


@BOTH
async def test_prefixes_are_shared_inside_a_tenant_and_a_salt_only(endpoint, body):
    gateway = gateway_before(playing([last("a")]))

    async def salt(tenant: str, **fields: Any) -> str:
        await Client({**body, **fields}).call(endpoint, gateway, tenant=tenant)
        return gateway.bridge.requests[-1].salt

    plain = await salt("t")
    others = [await salt("u"), await salt("t", cache_salt="x"), await salt("tx")]
    assert await salt("t") == plain
    assert len({plain, *others}) == 4
    assert plain != gateway_before(playing()).salt_of("t")  # another start, another key


def test_salts_under_one_key_are_the_same_at_every_start():
    settings = Settings(salt_key=b"k", served_models=("m",))
    first, second = (gateway_before(playing(), settings=settings) for _ in range(2))
    assert first.salt_of("t", "x") == second.salt_of("t", "x")
    assert first.salt_of("1:t") != first.salt_of("1", "t")


async def test_the_id_of_a_body_comes_first():
    assert (
        await request_of(completions, {**COMPLETION, "request_id": "mine"})
    ).request_id == "mine"


async def test_a_call_whose_id_is_in_use_gets_another():
    more = anyio.Event()
    bridge = playing(more, [last("a")])
    gateway, first, second = gateway_before(bridge), Client(COMPLETION), Client(COMPLETION)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.call, completions, gateway)
        tasks.start_soon(second.call, completions, gateway)
        while len(bridge.requests) < 2:
            await anyio.lowlevel.checkpoint()
        more.set()
    ids = {client.answered.json["id"] for client in (first, second)}
    assert len(ids) == 2
    assert "cmpl-abc" in ids
    assert gateway.requests_of("abc") == ()


@BOTH
@pytest.mark.parametrize("stream", [True, False])
async def test_a_tenant_over_its_budget_is_refused(endpoint, body, stream):
    bridge = playing(anyio.Event())
    gateway = gateway_before(bridge, budgets=Budgets(Budget(num_open=1)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(body).call, endpoint, gateway)
        while not bridge.requests:
            await anyio.lowlevel.checkpoint()
        answered = await Client({**body, "stream": stream}).call(endpoint, gateway)
        tasks.cancel_scope.cancel()
    assert answered.status == 429
    assert len(bridge.requests) == 1
    assert gateway.budgets.num_open("t") == 0


async def test_each_choice_of_each_prompt_counts_against_the_budget():
    bridge = playing(anyio.Event())
    gateway = gateway_before(bridge)
    async with anyio.create_task_group() as tasks:
        body = {"prompt": ["a", "b", "c"], "n": 2}
        tasks.start_soon(Client(body).call, completions, gateway)
        while len(bridge.requests) < 3:
            await anyio.lowlevel.checkpoint()
        assert gateway.budgets.num_open("t") == 6
        tasks.cancel_scope.cancel()
    assert gateway.budgets.num_open("t") == 0


@pytest.mark.parametrize("endpoint", [completions, chat, invocations, tokenize, detokenize])
async def test_a_body_on_its_way_has_a_place_in_the_budget(endpoint):
    """To read and encode prompts costs memory and threads, which others need too."""
    gateway, slow = gateway_before(playing(), budgets=Budgets(Budget(num_open=1))), Client()
    slow._is_read = True  # nothing of its body ever comes

    async def ask() -> None:
        with pytest.raises(ClientDisconnect):
            await slow.call(endpoint, gateway)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        assert (await Client(COMPLETION).call(completions, gateway)).status == 429
        slow.gone.set()
    assert gateway.budgets.num_open("t") == 0


@BOTH
async def test_a_call_with_a_token_waits_no_longer(endpoint, body):
    bridge = playing([event("a")], anyio.Event())
    gateway = gateway_before(bridge, budgets=Budgets(Budget(num_waiting=1)))
    async with anyio.create_task_group() as tasks:
        client = Client({**body, "stream": True})
        tasks.start_soon(client.call, endpoint, gateway)
        await client.received(1)
        second = Client({**body, "stream": True})
        tasks.start_soon(second.call, endpoint, gateway)
        await second.received(1)
        tasks.cancel_scope.cancel()
    assert len(bridge.requests) == 2


async def test_an_overload_says_when_to_come_back():
    def script(request: GraphRequest) -> Any:
        return [[last("", "refused", code="queue_full", retry_after_s=2.5)]]

    bridge = playing()
    bridge.script = script
    gateway = gateway_before(bridge)

    async def refused() -> Any:
        client = Client(COMPLETION)
        response = await completions(gateway, Request(client.scope(), client.receive))
        with pytest.raises(ApiError) as caught:
            await response(client.scope(), client.receive, client.send)
        return caught.value

    error = await refused()
    assert (error.status, error.retry_after_s, error.should_retry) == (503, 2.5, True)
    for _ in range(20):
        error = await refused()
    assert error.should_retry is False


def test_a_client_does_not_try_again_what_should_not_wait():
    refusal = last("", "refused", code="would_wait", retry_after_s=2.5)
    error = error_of(refusal, "r", lambda: True)
    assert (error.status, error.retry_after_s, error.should_retry) == (503, 2.5, False)


async def test_invocations_go_by_the_shape_of_the_body():
    whole = await post(invocations, playing([last("a")]), CHAT)
    assert whole.json["object"] == "chat.completion"
    whole = await post(invocations, playing([last("a")]), COMPLETION)
    assert whole.json["object"] == "text_completion"


@pytest.mark.parametrize("body", [{}, {"prompt": None}, [], 5, {"input": "a"}])
async def test_an_invocation_of_no_known_shape_is_refused(body):
    content = b"[]" if body == [] else body
    answered = await post(invocations, playing(), content)
    assert answered.status == 400
