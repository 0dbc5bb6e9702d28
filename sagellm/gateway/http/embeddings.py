"""The endpoint /v1/embeddings: texts in, one vector for each text out."""

from base64 import b64encode
from collections.abc import Sequence

import anyio
import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagellm.gateway.answers.event_stream import attended
from sagellm.gateway.answers.objects import EmbeddingEntry, EmbeddingList, EmbeddingUsage
from sagellm.gateway.answers.writer import UsageCounter, error_of
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.budgets import BudgetHold, Budgets
from sagellm.gateway.gateway import Gateway, HostedModel, embedding_model
from sagellm.gateway.http.call import CLIENT_LEFT, Call
from sagellm.gateway.http.checks import RequestBody
from sagellm.gateway.protocol.embedding_body import EmbeddingRequest, read_embedding
from sagellm.gateway.protocol.sampling_params import check_ids
from sagellm.runtime.messages import NORMAL, PRIORITIES, TokenEvent
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.session.requests import Timing
from sagellm.session.vectors import floats_of

_WRITTEN_AT_ONCE = 1 << 14  # numbers; other calls get a turn of the loop between


async def embeddings(gateway: Gateway, request: Request) -> "EmbeddingResponse":
    return EmbeddingResponse(gateway, request)


class EmbeddingResponse:
    """The response to one call, an ASGI app. All texts are one request of the graph, and each text
    is a choice of it, so that texts of several calls share batches.
    """

    def __init__(self, gateway: Gateway, request: Request) -> None:
        self._gateway = gateway
        self._request = request
        self._call: Call = request.state.call
        self._usage = request.state.usage = UsageCounter()  # for the log line of the call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the call. Raises ApiError if it is refused."""
        with self._budgets.hold(self._call.tenant) as hold:
            body = await self._request.body()
            asked = read_embedding(body, self._gateway.settings.limits)
            async with attended(receive) as client:
                content = await self._content(asked, hold)
        if client.has_left:
            self._gateway.meters.disconnected()
            response = Response(status_code=CLIENT_LEFT)
        else:
            response = Response(content, media_type="application/json")
        await response(scope, receive, send)

    async def _content(self, asked: EmbeddingRequest, hold: BudgetHold) -> bytes:
        """Return the JSON text of the answer. Raises ApiError if a text is not served."""
        gateway = self._gateway
        served = embedding_model(gateway, asked.model)
        if asked.dimensions is not None and asked.dimensions > served.card.vector_len:
            longest = served.card.vector_len
            raise wrong("dimensions", f"is {asked.dimensions}; the model has vectors of {longest}")
        texts = await token_ids_of(served, asked)
        wanted = asked.request_id or self._call.request_id
        with hold.widened(len(texts)), gateway.claim(wanted) as claimed:
            request = self._graph_request(asked, served, texts, claimed.request_ids[0])
            events = await self._events(request, self._timing(asked), len(texts), hold)
        usage = sum(event.num_prompt_tokens for event in events)
        return await _written(asked, served.card.id, events, usage)

    def _graph_request(
        self,
        asked: EmbeddingRequest,
        served: HostedModel,
        texts: Sequence[tuple[int, ...]],
        request_id: str,
    ) -> GraphRequest:
        call, card = self._call, served.card
        tags = {"operation": "embeddings"}
        if call.traceparent:
            tags["traceparent"] = call.traceparent
        return GraphRequest(
            request_id=request_id,
            texts=tuple(texts),
            dimensions=asked.dimensions,
            priority=self._priority(asked),
            user_id=call.tenant,
            model=card.key or card.id,
            tags=tags,
        )

    async def _events(
        self, request: GraphRequest, timing: Timing, number: int, hold: BudgetHold
    ) -> list[TokenEvent]:
        """Return the event of each text, in the order of the texts. Raises ApiError."""
        found: dict[int, TokenEvent] = {}
        async with self._gateway.bridge.open_stream(request, timing) as batches:
            async for batch in batches:
                for event in batch:
                    if event.finish_reason is None:
                        continue
                    error = error_of(event, self._call.request_id, self._may_retry)
                    if error is not None:
                        raise error
                    if not event.vector:
                        raise ApiError(500, "the graph gave no vector", code="engine_failed")
                    found[event.choice] = event
                    self._usage.count(event.choice, event)
                hold.first_token()
        if len(found) < number:
            raise ApiError(500, "the graph ended before all vectors", code="engine_failed")
        return [found[choice] for choice in range(number)]

    def _timing(self, asked: EmbeddingRequest) -> Timing:
        body: RequestBody | None = self._request.scope["state"].get("body")
        read_s = None if body is None else body.read_s
        waited_s = 0.0 if read_s is None else anyio.current_time() - read_s
        return Timing(asked.timeout_s, waited_s)

    def _may_retry(self) -> bool:
        return self._budgets.may_retry(self._call.tenant)

    @property
    def _budgets(self) -> Budgets:
        gateway = self._gateway
        return gateway.background_budgets if self._call.is_background else gateway.budgets

    def _priority(self, asked: EmbeddingRequest) -> int:
        if self._call.is_background:
            return PRIORITIES["background"]
        return NORMAL if asked.priority is None else asked.priority


async def token_ids_of(served: HostedModel, asked: EmbeddingRequest) -> list[tuple[int, ...]]:
    """Return the token ids of each text, cut if the request wants it. Raises ApiError (400)."""
    texts, longest = asked.texts, served.card.max_model_len
    many = len(texts) > 1
    places = [f"input[{number}]" if many else "input" for number in range(len(texts))]
    written = [text for text in texts if isinstance(text, str)]
    if asked.truncate_prompt_tokens is None:
        for place, text in zip(places, written, strict=False):
            if await served.encoder.exceeds(text, longest, param="input"):
                raise wrong(place, f"is much longer than the {longest} tokens that the model takes")
    add = asked.add_special_tokens
    encoded = iter(await served.encoder.texts(written, add_special_tokens=add, param="input"))
    found = [next(encoded) if isinstance(text, str) else text for text in texts]
    around: tuple[int, ...] = ()
    if asked.truncate_prompt_tokens is not None:
        around = await served.encoder.text("", add_special_tokens=add, param="input")
    kept = []
    for place, given, token_ids in zip(places, texts, found, strict=True):
        if not isinstance(given, str):
            check_ids(place, token_ids, served.facts)
        limit = _limit(asked, longest)
        if limit is not None and len(token_ids) > limit:
            token_ids = cut(token_ids, limit, around if isinstance(given, str) else ())
        if not token_ids:
            raise wrong(place, "has no token")
        if len(token_ids) > longest:
            what = f"has {len(token_ids)} tokens, and the model takes {longest}"
            raise wrong(place, f"{what}; shorten it, or send `truncate_prompt_tokens`: -1")
        kept.append(token_ids)
    return kept


def _limit(asked: EmbeddingRequest, longest: int) -> int | None:
    wanted = asked.truncate_prompt_tokens
    return longest if wanted == -1 else wanted


def cut(token_ids: tuple[int, ...], limit: int, around: tuple[int, ...]) -> tuple[int, ...]:
    """Return at most `limit` tokens of a text, without its end.

    `around`: the special tokens of an empty text. Those after the text are kept, as when the
    tokenizer itself cuts a text.
    """
    before = 0
    while before < len(around) and around[before] == token_ids[before]:
        before += 1
    after = around[before:]
    if len(around) >= limit or (after and token_ids[-len(after) :] != after):
        return token_ids[:limit]
    return token_ids[: limit - len(after)] + after


async def _written(
    asked: EmbeddingRequest, model: str, events: Sequence[TokenEvent], num_tokens: int
) -> bytes:
    """Return the JSON text of the vectors."""
    data: list[EmbeddingEntry] = []
    num_written = 0
    for index, event in enumerate(events):
        if asked.encoding_format == "base64":
            vector = msgspec.Raw(b'"%s"' % b64encode(event.vector))
        else:
            vector = msgspec.Raw(msgspec.json.encode(floats_of(event.vector)))
            num_written += len(event.vector) // 4
        data.append(EmbeddingEntry(index=index, embedding=vector))
        if num_written >= _WRITTEN_AT_ONCE:
            num_written = 0
            await anyio.lowlevel.checkpoint()
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return msgspec.json.encode(EmbeddingList(data=data, model=model, usage=usage))
