"""The endpoints of /v1/responses: a response is made, and never stored."""

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.responses_events import PREFIX, ResponsesForm
from sagellm.gateway.answers.responses_objects import ResponseObject
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.chats import chat_call
from sagellm.gateway.http.generation import GenerationCall, GenerationResponse
from sagellm.gateway.protocol.responses_body import ResponsesCall, read_responses
from sagellm.gateway.protocol.responses_fields import PlainText, ReasoningOptions, TextOptions


async def responses(gateway: Gateway, request: Request) -> GenerationResponse:
    """Answer a response, whole or as a stream of events."""
    return GenerationResponse(gateway, request, _responses_call)


async def stored_response(gateway: Gateway, request: Request) -> Response:
    """Answer 404: responses are not stored, so none can be fetched, cancelled or deleted."""
    message = "responses are not stored; send the earlier items in `input` of the next request"
    raise ApiError(404, message, param="response_id", code="response_not_found")


async def _responses_call(gateway: Gateway, body: bytes) -> GenerationCall:
    """Read the body of /v1/responses. Raises ApiError."""
    read = read_responses(body, gateway.settings.limits)
    form = partial(ResponsesForm, _echo(read))
    with read.made.naming():
        return await chat_call(gateway, read.chat, form, PREFIX)


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
