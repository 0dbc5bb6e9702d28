"""Chats of any API: from a checked conversation to the call that generates its answer."""

from sagellm.gateway.answers.forms import ChatForm
from sagellm.gateway.answers.writer import MakeAnswerForm
from sagellm.gateway.api_errors import wrong
from sagellm.gateway.gateway import Gateway, HostedModel, served_model
from sagellm.gateway.http.generation import GenerationCall, encoded, samplings_of
from sagellm.gateway.protocol.bodies import ChatRequest, read_chat
from sagellm.gateway.protocol.chat_messages import rendering_of
from sagellm.gateway.protocol.sampling_params import kept_ids
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
    served = served_model(gateway, asked.model)
    prompt = await chat_prompt(served, asked)
    return GenerationCall(
        request=asked,
        served=served,
        prompts=(prompt,),
        samplings=await samplings_of(served, asked, (prompt,)),
        make_form=make_form,
        prefix=prefix,
    )


def _unrendered(asked: ChatRequest, how: Rendering) -> Encoded:
    """Return the conversation as messages, for an engine that renders them itself.

    Raises ApiError (400) for options of rendering, which such an engine does not get.
    """
    if how != DEFAULT_RENDERING:
        raise wrong("messages", "go to an engine that renders them itself, in its own way only")
    return Encoded("", (), tuple(asked.conversation))


async def chat_prompt(served: HostedModel, asked: ChatRequest) -> Encoded:
    """Return the prompt of a chat: rendered by the model's template, and truncated."""
    how = rendering_of(asked, await served.encoder.variables())
    if served.facts.takes_text:
        return _unrendered(asked, how)
    text = await served.encoder.render(asked.conversation, how)
    token_ids = await encoded(served, asked, text)
    kept = kept_ids(asked, token_ids, served.facts)
    return Encoded(text if len(kept) == len(token_ids) else await served.encoder.ids(kept), kept)
