"""The endpoints of all routes: status, models, completions, chats, tokens, administration."""

from importlib.metadata import version as installed

import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.forms import CompletionForm
from sagellm.gateway.answers.objects import (
    Cancelled,
    Detokenized,
    ModelEntry,
    ModelList,
    TokenizeAnswer,
    TokenizerFacts,
)
from sagellm.gateway.api_errors import ApiError, draining, wrong
from sagellm.gateway.gateway import (
    Gateway,
    HostedModel,
    generating_model,
    plain_id,
    served_model,
)
from sagellm.gateway.http.bound_answers import response_grammar
from sagellm.gateway.http.chats import read_chat_call
from sagellm.gateway.http.generation import (
    GenerationCall,
    GenerationResponse,
    encoded,
    samplings_of,
)
from sagellm.gateway.protocol.bodies import (
    CompletionRequest,
    TokenizePrompt,
    TokenizeRequest,
    read_completion,
    read_detokenize,
    read_tokenize,
)
from sagellm.gateway.protocol.chat_messages import rendering_of
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.sampling_params import ModelCard, check_ids, kept_ids
from sagellm.graphs.text.codec import to_json
from sagellm.session.requests import Encoded

VERSION = installed("sagellm")


async def live(gateway: Gateway, request: Request) -> Response:
    """Answer 200 always: the process runs."""
    return Response()


async def ready(gateway: Gateway, request: Request) -> Response:
    """Answer 200 if the gateway accepts new requests and the graph produces tokens, else 503."""
    if gateway.is_draining:
        raise draining()
    return await health(gateway, request)


async def health(gateway: Gateway, request: Request) -> Response:
    """Answer 200 if the graph produces tokens, also during a drain, else 503 with the reason."""
    if not gateway.readiness.is_ready:
        reason = gateway.readiness.reason
        raise ApiError(503, f"not ready: {reason}", code="not_ready", retry_after_s=1.0)
    return Response()


async def version(gateway: Gateway, request: Request) -> Response:
    return _json({"version": VERSION})


async def load(gateway: Gateway, request: Request) -> Response:
    """Answer the number of open calls of all gateways at this address, for load balancers."""
    return _json({"server_load": request.state.calls.everywhere.total})


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def metrics(gateway: Gateway, request: Request) -> Response:
    """Answer the metrics, in the text format that the Accept header asks for."""
    # `no-store`: a cache between scraper and gateway would repeat old values.
    body, content_type = await gateway.meters.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})


async def models(gateway: Gateway, request: Request) -> Response:
    """Answer one entry for each name of each model, as in the OpenAI API."""
    cards = [served.card for served in gateway.models]
    return json_response(
        ModelList(data=[_model(card, name) for card in cards for name in card.names])
    )


async def model(gateway: Gateway, request: Request) -> Response:
    name = request.path_params["id"]
    return json_response(_model(served_model(gateway, name).card, name))


def json_response(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _model(card: ModelCard, name: str) -> ModelEntry:
    return ModelEntry(
        id=name, created=card.created, root=card.root, max_model_len=card.max_model_len
    )


async def cancel(gateway: Gateway, request: Request) -> Response:
    """Cancel the call with the x-request-id or answer id in the path. Its client gets an error."""
    named = request.path_params["id"]
    # A list, not `any`: every request of the call must be cancelled.
    known = [await gateway.bridge.cancel(request_id) for request_id in gateway.requests_of(named)]
    if not any(known) and not await gateway.bridge.cancel_elsewhere(plain_id(named)):
        raise ApiError(404, "no such request is under way", param="id", code="request_not_found")
    return json_response(Cancelled(id=named, cancelled=True))


async def graph(gateway: Gateway, request: Request) -> Response:
    """Answer the open graph as JSON."""
    if gateway.graph is None:
        raise ApiError(404, "this gateway serves no graph of its own")
    return Response(to_json(gateway.graph), media_type="application/json")


async def completions(gateway: Gateway, request: Request) -> GenerationResponse:
    return GenerationResponse(gateway, request, _completion_call)


async def chat(gateway: Gateway, request: Request) -> GenerationResponse:
    return GenerationResponse(gateway, request, read_chat_call)


async def invocations(gateway: Gateway, request: Request) -> GenerationResponse:
    """Answer a chat if the body has `messages`, and a completion if it has a `prompt`."""
    return GenerationResponse(gateway, request, _invocation_call)


async def _invocation_call(gateway: Gateway, body: bytes) -> GenerationCall:
    """Read the body of a chat or a completion. Raises ApiError (400) for any other body."""
    # `read_chat` and `read_completion` parse the bytes again, so every endpoint checks alike.
    value = read_json(body, max_depth=gateway.settings.limits.json_depth)
    if isinstance(value, dict) and value.get("messages") is not None:
        return await read_chat_call(gateway, body)
    if isinstance(value, dict) and value.get("prompt") is not None:
        return await _completion_call(gateway, body)
    raise ApiError(400, "the body has neither `messages` (a chat) nor a `prompt`")


async def _completion_call(gateway: Gateway, body: bytes) -> GenerationCall:
    asked = read_completion(body, gateway.settings.limits)
    served = generating_model(gateway, asked.model)
    prompts = await _prompts(served, asked)
    return GenerationCall(
        request=asked,
        served=served,
        prompts=tuple(prompts),
        samplings=await samplings_of(
            served, asked, prompts, await response_grammar(gateway, served, asked)
        ),
        make_form=CompletionForm,
        prefix="cmpl-",
        is_echo=asked.echo,
        is_prompt_only=asked.is_prompt_only,
    )


async def _prompts(served: HostedModel, asked: CompletionRequest) -> list[Encoded]:
    """Return all prompts of a completion, with text and tokens."""
    prompts: list[Encoded] = []
    for given in asked.prompts:
        if prompts:  # short prompts are encoded on the loop, so other calls need a turn between
            await anyio.lowlevel.checkpoint()
        prompts.append(await _prompt(served, asked, given))
    return prompts


async def _prompt(
    served: HostedModel, asked: CompletionRequest, given: str | tuple[int, ...]
) -> Encoded:
    """Return one prompt's text and tokens, after truncation."""
    if not isinstance(given, str):  # ids need a text too: operators may read and rewrite it
        check_ids("prompt", given, served.facts)
        kept = kept_ids(asked, given, served.facts)
        return Encoded(await served.encoder.ids(kept), kept)
    token_ids = await encoded(served, asked, given)
    kept = kept_ids(asked, token_ids, served.facts)
    text = given if len(kept) == len(token_ids) else await served.encoder.ids(kept)
    return Encoded(text, kept)


async def tokenize(gateway: Gateway, request: Request) -> Response:
    """Answer the tokens of a text or a conversation."""
    # Tokenizing costs threads, so it counts in the tenant's budget like a request.
    with gateway.budgets.hold(request.state.call.tenant):
        return json_response(await _tokens(gateway, await request.body()))


async def detokenize(gateway: Gateway, request: Request) -> Response:
    """Answer the text of token ids."""
    with gateway.budgets.hold(request.state.call.tenant):
        asked = read_detokenize(await request.body(), gateway.settings.limits)
        served = served_model(gateway, asked.model)
        check_ids("tokens", asked.tokens, served.facts)
        return json_response(Detokenized(await served.encoder.ids(tuple(asked.tokens))))


async def _tokens(gateway: Gateway, body: bytes) -> TokenizeAnswer:
    asked = read_tokenize(body, gateway.settings.limits)
    served = served_model(gateway, asked.model)
    token_ids = await _token_ids(served, asked)
    return TokenizeAnswer(
        count=len(token_ids),
        max_model_len=served.card.max_model_len,
        tokens=token_ids,
        token_strs=await served.encoder.spelt(token_ids) if asked.return_token_strs else None,
    )


async def tokenizer_info(gateway: Gateway, request: Request) -> Response:
    """Answer facts about the tokenizer of the model in the query, `?model=NAME`."""
    served = served_model(gateway, request.query_params.get("model"))
    tokenizer = served.tokenizer
    special = tokenizer.special_tokens
    eos = tokenizer.eos_token_ids
    return json_response(
        TokenizerFacts(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            model_max_length=served.card.max_model_len,
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token") or (tokenizer.token(eos[0]) if eos else None),
            unk_token=special.get("unk_token"),
            pad_token=special.get("pad_token"),
            chat_template=tokenizer.chat_template,
        )
    )


async def _token_ids(served: HostedModel, asked: TokenizeRequest) -> tuple[int, ...]:
    if served.facts.takes_text:
        raise wrong("model", "has an engine that takes text; its tokens are not known here")
    add = asked.add_special_tokens
    if isinstance(asked, TokenizePrompt):
        return await served.encoder.text(asked.prompt, add_special_tokens=add)
    how = rendering_of(asked, await served.encoder.variables())
    prompt = await served.encoder.chat(asked.conversation, how, add_special_tokens=add)
    return prompt.token_ids
