"""The endpoints whose bodies are translated to chats: /v1/messages with its count_tokens, and
/v1/responses with its input_tokens. Responses are not stored.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.anthropic_events import MessageOptions, MessagesForm, ShownThinking
from sagellm.gateway.answers.anthropic_objects import CountedTokens
from sagellm.gateway.answers.responses_events import PREFIX as RESPONSE_PREFIX
from sagellm.gateway.answers.responses_events import ResponsesForm
from sagellm.gateway.answers.responses_objects import CountedInput, ResponseObject
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import Call
from sagellm.gateway.http.chats import chat_call, num_prompt_tokens
from sagellm.gateway.http.generation import GenerationCall, GenerationResponse
from sagellm.gateway.item_memory import ReferencedItems
from sagellm.gateway.protocol.anthropic_body import read_count_body, read_messages_body
from sagellm.gateway.protocol.anthropic_chat import chat_of
from sagellm.gateway.protocol.anthropic_fields import ThinkingOptions
from sagellm.gateway.protocol.responses_body import ResponsesCall, read_responses
from sagellm.gateway.protocol.responses_fields import PlainText, ReasoningOptions, TextOptions

_MESSAGE_PREFIX = "msg_"


async def messages(gateway: Gateway, request: Request) -> GenerationResponse:
    return GenerationResponse(gateway, request, read_messages_call)


async def read_messages_call(gateway: Gateway, body: bytes) -> GenerationCall:
    """Read the body of /v1/messages. Raises ApiError."""
    limits = gateway.settings.limits
    asked = read_messages_body(body, limits)
    chat = chat_of(asked)
    options = MessageOptions(
        stop_sequences=tuple(asked.stop_sequences), thinking=_shown(asked.thinking)
    )
    form = partial(MessagesForm, options=options)
    read = chat.read(limits)
    with chat.naming():
        call = await chat_call(gateway, read, form, _MESSAGE_PREFIX)
    return _limited(call, asked.max_tokens, options)


def _limited(call: GenerationCall, max_tokens: int, options: MessageOptions) -> GenerationCall:
    """Return a call, whose answer may fill the context, with the limit that the client gave."""
    (sampling,) = call.samplings
    if sampling.max_tokens < max_tokens:
        clipped = replace(options, is_clipped=True)
        return replace(call, make_form=partial(MessagesForm, options=clipped))
    limited = msgspec.structs.replace(sampling, max_tokens=max_tokens)
    return replace(call, samplings=(limited,))


def _shown(thinking: ThinkingOptions | None) -> ShownThinking:
    if thinking is None:
        return "shown"
    if thinking.type == "disabled":
        return "none"  # some models reason in any case
    return "empty" if thinking.display == "omitted" else "shown"


async def count_tokens(gateway: Gateway, request: Request) -> Response:
    """Answer the number of tokens that the model would read."""
    # Tokenizing costs threads, so it counts in the tenant's budget like a request.
    with gateway.budgets.hold(request.state.call.tenant):
        number = await _num_tokens(gateway, await request.body())
    return Response(msgspec.json.encode(CountedTokens(number)), media_type="application/json")


async def _num_tokens(gateway: Gateway, body: bytes) -> int:
    limits = gateway.settings.limits
    chat = chat_of(read_count_body(body, limits))
    asked = chat.read(limits)
    with chat.naming():
        return await num_prompt_tokens(gateway, asked)


async def responses(gateway: Gateway, request: Request) -> GenerationResponse:
    """Answer a response, whole or as a stream of events."""
    return GenerationResponse(gateway, request, partial(_responses_call, request.state.call))


async def stored_response(gateway: Gateway, request: Request) -> Response:
    """Answer 404: responses are not stored, so none can be fetched, cancelled or deleted."""
    message = "responses are not stored; send the earlier items in `input` of the next request"
    raise ApiError(404, message, param="response_id", code="response_not_found")


async def _responses_call(call: Call, gateway: Gateway, body: bytes) -> GenerationCall:
    """Read the body of /v1/responses. Raises ApiError."""
    read = _read(call, gateway, body)
    # Nobody goes on with a conversation of a batch, whose many items would push out all others.
    is_kept = read.asked.store and not call.is_background
    keep = partial(gateway.items.keep, call.tenant) if is_kept else None
    form = partial(ResponsesForm, _echo(read), keep=keep)
    with read.made.naming():
        return await chat_call(gateway, read.chat, form, RESPONSE_PREFIX)


def _read(call: Call, gateway: Gateway, body: bytes) -> ResponsesCall:
    limits = gateway.settings.limits
    return read_responses(
        body, limits, ReferencedItems(gateway.items, call.tenant, limits.body_bytes)
    )


async def input_tokens(gateway: Gateway, request: Request) -> Response:
    """Answer the number of tokens that the model would read for a body of /v1/responses."""
    call: Call = request.state.call
    # Tokenizing costs threads, so it counts in the tenant's budget like a request.
    with gateway.budgets.hold(call.tenant):
        read = _read(call, gateway, await request.body())
        with read.made.naming():
            counted = CountedInput(input_tokens=await num_prompt_tokens(gateway, read.chat))
    return Response(msgspec.json.encode(counted), media_type="application/json")


def _echo(read: ResponsesCall) -> ResponseObject:
    """Return a response that has only what it repeats of its request, with the defaults."""
    asked, chat = read.asked, read.chat
    text, reasoning = asked.text or TextOptions(), asked.reasoning or ReasoningOptions()
    return ResponseObject(
        id="",
        created_at=0,
        status="in_progress",
        model="",
        output=[],
        instructions=asked.instructions,
        max_output_tokens=chat.asked_tokens,
        metadata=asked.metadata,
        parallel_tool_calls=chat.parallel_tool_calls,
        prompt_cache_key=chat.prompt_cache_key,
        reasoning=_raw({"effort": reasoning.effort, "summary": reasoning.summary}),
        safety_identifier=chat.safety_identifier,
        temperature=chat.temperature,
        text=_raw({"format": text.format or PlainText(), "verbosity": text.verbosity or "medium"}),
        tool_choice=_raw("auto" if asked.tool_choice is None else asked.tool_choice),
        tools=_raw(asked.tools),
        top_logprobs=chat.top_logprobs or 0,
        top_p=chat.top_p,
        truncation=asked.truncation,
        user=chat.user,
    )


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
