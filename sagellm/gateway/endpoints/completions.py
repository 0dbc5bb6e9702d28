"""POST /v1/completions: text or token ids, one prompt or many, to text."""

import anyio.lowlevel
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.completion import CompletionForm
from sagellm.gateway.encoding import Prompt
from sagellm.gateway.endpoints.generation import Work, encoded, respond, samplings_of
from sagellm.gateway.endpoints.models import served_model
from sagellm.gateway.gateway import Gateway, Served
from sagellm.gateway.protocol.completions import CompletionRequest, read_completion
from sagellm.gateway.protocol.sampling import check_ids, kept_ids


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
