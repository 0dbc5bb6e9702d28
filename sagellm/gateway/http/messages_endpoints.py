"""The endpoints of /v1/messages and its count_tokens."""

from dataclasses import replace
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.anthropic_events import MessageOptions, MessagesForm, ShownThinking
from sagellm.gateway.answers.anthropic_objects import CountedTokens
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.chats import chat_call, num_prompt_tokens
from sagellm.gateway.http.generation import GenerationCall, GenerationResponse
from sagellm.gateway.protocol.anthropic_body import read_count_body, read_messages_body
from sagellm.gateway.protocol.anthropic_chat import chat_of
from sagellm.gateway.protocol.anthropic_fields import ThinkingOptions

_PREFIX = "msg_"


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
        call = await chat_call(gateway, read, form, _PREFIX)
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
