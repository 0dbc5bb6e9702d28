"""POST /v1/completions, /v1/chat/completions and /invocations."""

import anyio.lowlevel
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.completions import ChatForm, CompletionForm
from sagellm.gateway.encoding import Prompt
from sagellm.gateway.endpoints.generation import Work, encoded, respond, samplings_of
from sagellm.gateway.endpoints.status import served_model
from sagellm.gateway.errors import ApiError, wrong
from sagellm.gateway.gateway import Gateway, Served
from sagellm.gateway.protocol.completions import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.conversation import rendering_of
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.sampling import check_ids, kept_ids
from sagellm.runtime.models.chat import ANSWERED, Rendering


async def completions(gateway: Gateway, request: Request) -> Response:
    with gateway.budgets.hold(request.state.call.tenant):  # to read and encode it costs, too
        work = await _work(gateway, await request.body())
    return await respond(gateway, request, work)


async def _work(gateway: Gateway, body: bytes) -> Work:
    asked = read_completion(body, gateway.settings.limits)
    served = served_model(gateway, asked.model)
    prompts = await _prompts(served, asked)
    return Work(
        request=asked,
        served=served,
        prompts=tuple(prompts),
        samplings=await samplings_of(served, asked, prompts),
        make_form=CompletionForm,
        prefix="cmpl-",
        is_echo=asked.echo,
        is_prompt_only=asked.is_prompt_only,
    )


async def _prompts(served: Served, asked: CompletionRequest) -> list[Prompt]:
    """Between any two of them others have their turn: each alone may be encoded in place."""
    prompts: list[Prompt] = []
    for given in asked.prompts:
        if prompts:
            await anyio.lowlevel.checkpoint()
        prompts.append(await _prompt(served, asked, given))
    return prompts


async def _prompt(served: Served, asked: CompletionRequest, given: str | tuple[int, ...]) -> Prompt:
    """Its text and tokens; the text of what is left where it is truncated."""
    if not isinstance(given, str):
        check_ids("prompt", given, served.facts)
        kept = kept_ids(asked, given, served.facts)
        return Prompt(await served.encoder.ids(kept), kept)
    token_ids = await encoded(served, asked, given)
    kept = kept_ids(asked, token_ids, served.facts)
    text = given if len(kept) == len(token_ids) else await served.encoder.ids(kept)
    return Prompt(text, kept)


async def chat(gateway: Gateway, request: Request) -> Response:
    with gateway.budgets.hold(request.state.call.tenant):  # to read and encode it costs, too
        work = await _chat_work(gateway, await request.body())
    return await respond(gateway, request, work)


async def _chat_work(gateway: Gateway, body: bytes) -> Work:
    asked = read_chat(body, gateway.settings.limits)
    served = served_model(gateway, asked.model)
    prompt = await _chat_prompt(served, asked)
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


async def _chat_prompt(served: Served, asked: ChatRequest) -> Prompt:
    """The conversation as the model's template writes it, or its part that is kept."""
    how = rendering_of(asked, await served.encoder.variables())
    if served.facts.takes_text:
        return _unrendered(asked, how)
    text = await served.encoder.render(asked.conversation, how)
    token_ids = await encoded(served, asked, text)
    kept = kept_ids(asked, token_ids, served.facts)
    return Prompt(text if len(kept) == len(token_ids) else await served.encoder.ids(kept), kept)


async def invocations(gateway: Gateway, request: Request) -> Response:
    """A chat where the body has `messages`, a completion where it has a `prompt`."""
    with gateway.budgets.hold(request.state.call.tenant):
        body = read_json(await request.body(), max_depth=gateway.settings.limits.json_depth)
    if isinstance(body, dict) and body.get("messages") is not None:
        return await chat(gateway, request)
    if isinstance(body, dict) and body.get("prompt") is not None:
        return await completions(gateway, request)
    raise ApiError(400, "the body has neither `messages` (a chat) nor a `prompt`")
