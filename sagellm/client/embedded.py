"""A graph that is open in this process, for the clients; loaded only on demand."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

import sagellm
from sagellm.builder import Graph
from sagellm.client.http_calls import CHAT, encode_json
from sagellm.client.replies import (
    AsyncReplyStream,
    Choice,
    Piece,
    PromptDetails,
    ReplyStream,
    ResponseBody,
    ResponseMessage,
    TextReply,
    Usage,
    make_piece,
    whole_reply,
)
from sagellm.client.responses import NOT_OFFERED, ClientError
from sagellm.gateway.answers.writer import error_of
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.graph_bridge import event_of
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.sampling_params import ModelBounds, sampling_of
from sagellm.gateway.settings import RequestLimits
from sagellm.graphs.ir import FrozenMap
from sagellm.runtime.messages import SERVED, Answer, Sampling, TokenEvent
from sagellm.session import Encoded, Output, Prompt, RequestError, RequestFailed, RequestRefused

_ANY_ID = 1 << 31  # which ids the model knows, its engine checks
_FIELDS = ("request_id", "priority", "slo_ttft_s", "timeout_s")
_KNOWN_OPTIONS = frozenset(
    {*Sampling.__struct_fields__, *_FIELDS, "max_completion_tokens", "user", "stream_options"}
) - {"logprobs", "prompt_logprobs", "bad_words_token_ids"}


class SessionEncoder(Protocol):
    """What of an open session bounds a call."""

    @property
    def max_model_len(self) -> int: ...

    def encode(self, prompt: Prompt) -> Encoded: ...


class SessionCall(msgspec.Struct, frozen=True):
    """One call as a session takes it."""

    prompt: Prompt
    sampling: Sampling
    fields: dict[str, Any]


def read_call(
    path: str, call: Mapping[str, Any], options: Mapping[str, Any], session: SessionEncoder
) -> SessionCall:
    """Checked as the gateway checks the same call. Raises ClientError."""
    try:
        return _session_call(path, encode_json({**call, **options}), options, session)
    except RequestError as error:
        raise ClientError(str(error), status=400, type="invalid_request_error") from error
    except ApiError as error:
        raise ClientError(
            error.message,
            status=error.status,
            code=error.code,
            type=error.type,
            param=error.param,
        ) from None


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _KNOWN_OPTIONS:
            cause = f"{name}: is not served by a graph in this process; serve it over HTTP"
            raise ClientError(cause, status=400, code=NOT_OFFERED, param=name)


def _session_call(
    path: str, body: bytes, options: Mapping[str, Any], session: SessionEncoder
) -> SessionCall:
    facts = ModelBounds(_ANY_ID, session.max_model_len)
    request: ChatRequest | CompletionRequest
    if path == CHAT:
        request = chat = read_chat(body, RequestLimits())
        prompt: Prompt = chat.conversation
    else:
        request = completion = read_completion(body, RequestLimits())
        if len(completion.prompts) != 1:
            raise wrong("prompt", "is a list of them; give one")
        (prompt,) = completion.prompts
    _check_names(options)  # after what no server knows either
    encoded = session.encode(prompt)
    sampling = sampling_of(request, facts, len(encoded.token_ids))
    return SessionCall(encoded, sampling, _fields(request))


def _fields(request: Any) -> dict[str, Any]:
    said = {name: getattr(request, name) for name in _FIELDS}
    return {name: value for name, value in said.items() if value is not None}


class StreamUsage:
    """Makes pieces of a stream's events, and the usage that its last piece has."""

    def __init__(self, num_choices: int) -> None:
        self._num_open = num_choices
        self._num_prompt = self._num_cached = self._num_sampled = 0

    def piece_of(self, event: Output) -> Piece:
        """Raises ClientError where the event ends a choice unserved."""
        check_served(event)
        self._num_open -= event.is_last
        self._num_sampled += event.num_tokens
        self._num_prompt = max(self._num_prompt, event.num_prompt_tokens)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        return make_piece(
            event.text,
            choice=event.choice,
            finish_reason=event.finish_reason,
            stop_reason=event.stop_reason,
            usage=None if self._num_open else self._usage,
        )

    @property
    def _usage(self) -> Usage:
        return _usage(self._num_prompt, self._num_cached, self._num_sampled)


def reply_of(answers: Sequence[Answer], model: str) -> TextReply:
    """The whole answer. Raises ClientError where a choice ended unserved."""
    for answer in answers:
        check_served(answer)
    choices = tuple(
        Choice(
            index=answer.choice,
            message=ResponseMessage("assistant", answer.text),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        for answer in answers
    )
    return whole_reply(ResponseBody(answers[0].request_id, model, choices, usage_of(answers)))


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Tokens of all choices; the prompt is counted once, as the OpenAI API does."""
    return _usage(
        max(answer.num_prompt_tokens for answer in answers),
        max(answer.num_cached_tokens for answer in answers),
        sum(answer.num_tokens for answer in answers),
    )


def _usage(num_prompt: int, num_cached: int, num_sampled: int) -> Usage:
    return Usage(num_prompt, num_sampled, num_prompt + num_sampled, PromptDetails(num_cached))


def check_served(end: Output) -> None:
    """Raise ClientError for the end of a choice that is no answer."""
    reason = end.finish_reason
    if reason is None or reason in SERVED:
        return
    raise unserved_error(end, end.error or f"the graph ended the request: {reason}")


def unserved_error(end: Output, message: str) -> ClientError:
    """The error of an end that is no answer, with the status, code and type of the gateway's."""
    event = end if isinstance(end, TokenEvent) else event_of(end)
    told = error_of(event, end.request_id, lambda: True)
    if told is None:  # filtered: over HTTP an answer with the finish reason content_filter
        return ClientError(message, code=str(end.finish_reason))
    return ClientError(
        message,
        status=told.status,
        code=told.code,
        type=told.type,
        retry_after_s=end.retry_after_s,
    )


GRAPH = "joint"


def _model_of(graph: Graph, model: str | None) -> str:
    (engine,) = graph.ir.engines.values()
    assert isinstance(engine, FrozenMap)
    return model or str(engine["model"])


def _check_model(asked: str | None, served: str) -> None:
    if asked not in (None, served):
        cause = f"model: {asked!r} is not served here; the graph has {served!r}"
        raise ClientError(cause, status=404, code="model_not_found", param="model")


def _status(model: str, session: Any) -> dict[str, Any]:
    statistics = session.statistics()
    return {
        "mode": "embedded",
        "url": None,
        "is_ready": True,
        "models": [model],
        "server_load": statistics.num_open,
        "version": sagellm.__version__,
    }


def _without_embeddings() -> ClientError:
    cause = "an embedded graph has no embeddings; use a server that has /v1/embeddings"
    return ClientError(cause, code=NOT_OFFERED)


def _client_error(error: RequestError | RequestFailed) -> ClientError:
    """The error that a server would answer with."""
    if isinstance(error, RequestRefused | RequestFailed):
        return unserved_error(error.end, str(error))
    return ClientError(str(error), status=400, type="invalid_request_error")


class Embedded:
    """The shipped joint graph, for plain threads."""

    def __init__(self, model: str | None) -> None:
        graph = Graph.load(GRAPH)
        self._model = _model_of(graph, model)
        self._opened = graph.open(model=model)
        self._session = self._opened.__enter__()
        self._is_open = True

    def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | ReplyStream:
        """One call for text: whole, or as it comes once the graph has accepted it."""
        _check_model(model, self._model)
        read = read_call(path, call, options, self._session)
        try:
            if stream:
                return self._streamed(read.prompt, read.sampling, read.fields)
            answers = self._session.generate_all(read.prompt, sampling=read.sampling, **read.fields)
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return reply_of(answers, self._model)

    def models(self) -> list[str]:
        return [self._model]

    def status(self) -> dict[str, Any]:
        return _status(self._model, self._session)

    def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        raise _without_embeddings()

    def close(self) -> None:
        """End what runs, and free the engine. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._opened.__exit__(None, None, None)

    def _streamed(self, prompt: Any, sampling: Any, fields: dict[str, Any]) -> ReplyStream:
        tally = StreamUsage(sampling.n)
        events = self._session.stream(prompt, sampling=sampling, **fields)
        try:
            first = tally.piece_of(next(events))
        except BaseException:  # nobody has the stream yet who would close it
            events.__exit__()
            raise

        def pieces() -> Iterator[Piece]:
            yield first
            yield from map(tally.piece_of, events)

        return ReplyStream(pieces(), events.__exit__)


class _AsyncPieces:
    """A stream's pieces behind the first, which was awaited to learn of a refusal."""

    def __init__(self, first: Piece, events: AsyncIterator[Output], tally: StreamUsage) -> None:
        self._first: Piece | None = first
        self._events = events
        self._tally = tally

    def __aiter__(self) -> "_AsyncPieces":
        return self

    async def __anext__(self) -> Piece:
        first, self._first = self._first, None
        return first if first is not None else self._tally.piece_of(await anext(self._events))


class AsyncEmbedded:
    """The shipped joint graph, for trio and asyncio: opened and closed by one task."""

    def __init__(self, model: str | None) -> None:
        graph = Graph.load(GRAPH)
        self._model = _model_of(graph, model)
        self._opened = graph.open(model=model)
        self._session: Any = None

    async def open(self) -> None:
        self._session = await self._opened.__aenter__()

    async def aclose(self, *error: Any) -> None:
        """End what runs, and free the engine. Idempotent."""
        if self._session is not None:
            self._session = None
            await self._opened.__aexit__(*(error or (None, None, None)))

    async def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | AsyncReplyStream:
        """One call for text: whole, or as it comes once the graph has accepted it."""
        _check_model(model, self._model)
        read = read_call(path, call, options, self._session)
        try:
            if stream:
                return await self._streamed(read.prompt, read.sampling, read.fields)
            answers = await self._session.generate_all(
                read.prompt, sampling=read.sampling, **read.fields
            )
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return reply_of(answers, self._model)

    async def models(self) -> list[str]:
        return [self._model]

    async def status(self) -> dict[str, Any]:
        return _status(self._model, self._session)

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        raise _without_embeddings()

    async def _streamed(
        self, prompt: Any, sampling: Any, fields: dict[str, Any]
    ) -> AsyncReplyStream:
        tally = StreamUsage(sampling.n)
        events = self._session.stream(prompt, sampling=sampling, **fields)
        try:
            first = tally.piece_of(await anext(events))
        except BaseException:  # nobody has the stream yet who would close it
            await events.aclose()
            raise
        return AsyncReplyStream(_AsyncPieces(first, events, tally), events.aclose)
