"""POST /v1/chat/completions: a conversation to its next message."""

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.chat import ChatForm
from sagellm.gateway.encoding import Prompt
from sagellm.gateway.endpoints.generation import Work, encoded, respond, samplings_of
from sagellm.gateway.endpoints.models import served_model
from sagellm.gateway.failure import wrong
from sagellm.gateway.gateway import Gateway, Served
from sagellm.gateway.protocol.chat import ChatRequest, read_chat
from sagellm.gateway.protocol.conversation import rendering_of
from sagellm.gateway.protocol.sampling import kept_ids
from sagellm.runtime.models.chat import ANSWERED, Rendering


async def chat(gateway: Gateway, request: Request) -> Response:
    with gateway.budgets.hold(request.state.call.tenant):  # to read and encode it costs, too
        work = await _work(gateway, await request.body())
    return await respond(gateway, request, work)


async def _work(gateway: Gateway, body: bytes) -> Work:
    asked = read_chat(body, gateway.settings.limits)
    served = served_model(gateway, asked.model)
    prompt = await _prompt(served, asked)
    return Work(
        request=asked,
        served=served,
        prompts=(prompt,),
        samplings=await samplings_of(served, asked, (prompt,)),
        make_form=ChatForm,
        prefix="chatcmpl-",
    )


def _unrendered(asked: ChatRequest, how: Rendering) -> Prompt:
    """The conversation as it is, for an engine with a template of its own."""
    if how != ANSWERED:
        raise wrong("messages", "go to an engine that renders them itself, in its own way only")
    return Prompt("", (), tuple(asked.conversation))


async def _prompt(served: Served, asked: ChatRequest) -> Prompt:
    """The conversation as the model's template writes it, or its part that is kept."""
    how = rendering_of(asked, await served.encoder.variables())
    if served.facts.takes_text:
        return _unrendered(asked, how)
    text = await served.encoder.render(asked.conversation, how)
    token_ids = await encoded(served, asked, text)
    kept = kept_ids(asked, token_ids, served.facts)
    return Prompt(text if len(kept) == len(token_ids) else await served.encoder.ids(kept), kept)
