"""Chats of any API: from a checked conversation to the call that generates its answer."""

from functools import partial

import msgspec

from sagellm.chat_formats import NO_TOOLS, OpenParser, ToolUse, open_plain_parser
from sagellm.gateway.answers.forms import ChatForm
from sagellm.gateway.answers.writer import MakeAnswerForm
from sagellm.gateway.api_errors import wrong
from sagellm.gateway.gateway import Gateway, HostedModel, generating_model
from sagellm.gateway.http.bound_answers import chat_grammar, check_tool_use
from sagellm.gateway.http.generation import GenerationCall, encoded, samplings_of
from sagellm.gateway.protocol.bodies import ChatRequest, read_chat
from sagellm.gateway.protocol.chat_messages import rendering_of
from sagellm.gateway.protocol.sampling_params import kept_ids
from sagellm.gateway.protocol.tool_choice import tool_use_of
from sagellm.runtime.models.chat import DEFAULT_RENDERING, Rendering
from sagellm.session.requests import Encoded


async def read_chat_call(gateway: Gateway, body: bytes) -> GenerationCall:
    """Read the body of /v1/chat/completions. Raises ApiError."""
    asked = read_chat(body, gateway.settings.limits)
    return await chat_call(gateway, asked, ChatForm, "chatcmpl-")


async def chat_call(
    gateway: Gateway, asked: ChatRequest, make_form: MakeAnswerForm, prefix: str
) -> GenerationCall:
    """Return the call of a checked conversation, in whichever API it came. Raises ApiError.

    `make_form`: writes the answer in that API. `prefix`: the start of the answer's id.
    """
    served = generating_model(gateway, asked.model)
    use = NO_TOOLS
    if asked.tools:
        use = tool_use_of(asked.tools, asked.tool_choice, parallel=asked.parallel_tool_calls)
        check_tool_use(served, use)
    prompt = await chat_prompt(served, asked)
    grammar = None
    if asked.is_structured or use.allowed:
        grammar = await chat_grammar(gateway, served, asked, use, prompt.text)
    (sampling,) = await samplings_of(served, asked, (prompt,), grammar)
    is_plain = not (use.allowed or served.format.has_reasoning)
    if not is_plain and served.format.keeps_special_tokens:
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    return GenerationCall(
        request=asked,
        served=served,
        prompts=(prompt,),
        samplings=(sampling,),
        make_form=make_form,
        prefix=prefix,
        open_parser=open_plain_parser if is_plain else _parsers(served, asked, use, prompt.text),
        has_reasoning=served.format.has_reasoning,
    )


def _parsers(served: HostedModel, asked: ChatRequest, use: ToolUse, prompt: str) -> OpenParser:
    """Return what opens the parser of one choice."""
    # The parser drops special tokens, which the text has for it, as the engine would have.
    dropped = served.special_tokens if asked.skip_special_tokens else {}
    return partial(served.format.open_parser, use, prompt, special_tokens=dropped)


def _unrendered(asked: ChatRequest, how: Rendering) -> Encoded:
    """Return the conversation as messages, for an engine that renders them itself.

    Raises ApiError (400) for options of rendering, which such an engine does not get.
    """
    if how != DEFAULT_RENDERING:
        raise wrong("messages", "go to an engine that renders them itself, in its own way only")
    return Encoded("", (), tuple(asked.conversation))


async def num_prompt_tokens(gateway: Gateway, asked: ChatRequest) -> int:
    """Return the number of tokens that the model would read. Raises ApiError."""
    served = generating_model(gateway, asked.model)
    if served.facts.takes_text:
        raise wrong("model", "has an engine that takes text; its tokens are not known here")
    return len((await chat_prompt(served, asked)).token_ids)


async def chat_prompt(served: HostedModel, asked: ChatRequest) -> Encoded:
    """Return the prompt of a chat: rendered by the model's template, and truncated."""
    how = rendering_of(asked, await served.encoder.variables(), asked.reasoning_effort)
    if served.facts.takes_text:
        return _unrendered(asked, how)
    text = await served.encoder.render(asked.conversation, how)
    token_ids = await encoded(served, asked, text)
    kept = kept_ids(asked, token_ids, served.facts)
    return Encoded(text if len(kept) == len(token_ids) else await served.encoder.ids(kept), kept)
