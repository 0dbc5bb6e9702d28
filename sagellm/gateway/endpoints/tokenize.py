"""POST /tokenize, /detokenize, GET /tokenizer_info: for clients that count as the server does."""

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.structs import Detokenized, TokenizerFacts, Tokens
from sagellm.gateway.endpoints.status import json_response, served_model
from sagellm.gateway.errors import wrong
from sagellm.gateway.gateway import Gateway, Served
from sagellm.gateway.protocol.conversation import rendering_of
from sagellm.gateway.protocol.sampling import check_ids
from sagellm.gateway.protocol.tokenize import (
    TokenizePrompt,
    TokenizeRequest,
    read_detokenize,
    read_tokenize,
)


async def tokenize(gateway: Gateway, request: Request) -> Response:
    with gateway.budgets.hold(request.state.call.tenant):
        return json_response(await _tokens(gateway, await request.body()))


async def detokenize(gateway: Gateway, request: Request) -> Response:
    with gateway.budgets.hold(request.state.call.tenant):
        asked = read_detokenize(await request.body(), gateway.settings.limits)
        served = served_model(gateway, asked.model)
        check_ids("tokens", asked.tokens, served.facts)
        return json_response(Detokenized(await served.encoder.ids(tuple(asked.tokens))))


async def _tokens(gateway: Gateway, body: bytes) -> Tokens:
    asked = read_tokenize(body, gateway.settings.limits)
    served = served_model(gateway, asked.model)
    token_ids = await _token_ids(served, asked)
    return Tokens(
        count=len(token_ids),
        max_model_len=served.card.max_model_len,
        tokens=token_ids,
        token_strs=await served.encoder.spelt(token_ids) if asked.return_token_strs else None,
    )


async def tokenizer_info(gateway: Gateway, request: Request) -> Response:
    """Of the model that the query names, `?model=NAME`."""
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


async def _token_ids(served: Served, asked: TokenizeRequest) -> tuple[int, ...]:
    if served.facts.takes_text:
        raise wrong("model", "has an engine that takes text; its tokens are not known here")
    add = asked.add_special_tokens
    if isinstance(asked, TokenizePrompt):
        return await served.encoder.text(asked.prompt, add_special_tokens=add)
    how = rendering_of(asked, await served.encoder.variables())
    prompt = await served.encoder.chat(asked.conversation, how, add_special_tokens=add)
    return prompt.token_ids
