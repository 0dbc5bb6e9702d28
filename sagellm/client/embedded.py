"""The service of a client with `embedded=True`: a graph that is open in this process."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import sagellm
from sagellm.builder import Graph
from sagellm.chat_formats import ToolCallDelta
from sagellm.client.embedded_calls import SessionCall, read_call
from sagellm.client.replies import (
    Choice,
    Piece,
    PromptDetails,
    ResponseBody,
    ResponseFunction,
    ResponseMessage,
    ResponseToolCall,
    TextReply,
    Usage,
    make_piece,
    whole_reply,
)
from sagellm.client.reply_streams import AsyncReplyStream, ReplyStream
from sagellm.client.responses import NOT_OFFERED, ClientError
from sagellm.gateway.answers.parts import ChoiceParts
from sagellm.gateway.answers.writer import error_of
from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import event_of
from sagellm.graphs.ir import FrozenMap
from sagellm.runtime.messages import SERVED, Answer
from sagellm.session import Output, RequestError, RequestFailed, RequestRefused

GRAPH = "joint"
TWO_MODELS, EMBEDDER = "embed", "embedder"  # the graph with a model that embeds, and its key there


class StreamUsage:
    """Converts the events of one stream to pieces, and counts the usage for the last piece."""

    def __init__(self, read: SessionCall) -> None:
        self._num_open = read.sampling.n
        self._parts = [parts_of(read) for _ in range(read.sampling.n)]
        self._num_prompt = self._num_cached = self._num_sampled = 0

    def piece_of(self, event: Output) -> Piece:
        """The piece of one event. Raises ClientError for a finish reason outside SERVED."""
        check_served(event)
        self._num_open -= event.is_last
        self._num_sampled += event.num_tokens
        self._num_prompt = max(self._num_prompt, event.num_prompt_tokens)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        counts = self._num_prompt, self._num_cached, self._num_sampled
        parts = self._parts[event.choice]
        found = parts.push(event_of(event))
        return make_piece(
            found.content,
            choice=event.choice,
            finish_reason=_finish_reason(event, parts),
            stop_reason=event.stop_reason,
            usage=None if self._num_open else _usage(*counts),
            reasoning=found.reasoning or None,
            tool_calls=tuple(map(_response_call, found.calls)),
        )


def parts_of(read: SessionCall) -> ChoiceParts:
    """The parser that splits one choice of a call into content, reasoning and tool calls."""
    return ChoiceParts(read.open_parser, shows_reasoning=read.shows_reasoning)


def _response_call(call: ToolCallDelta) -> ResponseToolCall:
    return ResponseToolCall(ResponseFunction(call.name, call.arguments), call.id, call.index)


def _finish_reason(event: Output, parts: ChoiceParts) -> str | None:
    return "tool_calls" if parts.ends_in_calls else event.finish_reason


def reply_of(answers: Sequence[Answer], model: str, read: SessionCall) -> TextReply:
    """The whole reply. Raises ClientError for a finish reason outside SERVED."""
    for answer in answers:
        check_served(answer)
    choices = tuple(_choice_of(answer, parts_of(read)) for answer in answers)
    # All choices share one prompt: the OpenAI API counts its tokens once.
    usage = _usage(
        max(answer.num_prompt_tokens for answer in answers),
        max(answer.num_cached_tokens for answer in answers),
        sum(answer.num_tokens for answer in answers),
    )
    return whole_reply(ResponseBody(answers[0].request_id, model, choices, usage))


def _choice_of(answer: Answer, parts: ChoiceParts) -> Choice:
    found = parts.push(event_of(answer))
    message = ResponseMessage(
        role="assistant",
        content=found.content,
        reasoning=found.reasoning or None,
        tool_calls=tuple(map(_response_call, found.calls)),
    )
    return Choice(
        index=answer.choice,
        message=message,
        finish_reason=_finish_reason(answer, parts),
        stop_reason=answer.stop_reason,
    )


def _usage(num_prompt: int, num_cached: int, num_sampled: int) -> Usage:
    return Usage(num_prompt, num_sampled, num_prompt + num_sampled, PromptDetails(num_cached))


def check_served(end: Output) -> None:
    """Raise ClientError for a finish reason outside SERVED; None is none."""
    reason = end.finish_reason
    if reason is not None and reason not in SERVED:
        raise unserved_error(end, end.error or f"the graph ended the request: {reason}")


def unserved_error(end: Output, message: str) -> ClientError:
    """The error of a choice that was not served, with the gateway's status, code and type."""
    api_error = error_of(event_of(end), end.request_id, lambda: True)
    if api_error is None:  # filtered: no error over HTTP, but finish reason content_filter
        return ClientError(message, code=str(end.finish_reason))
    status, code, type = api_error.status, api_error.code, api_error.type
    after_s = end.retry_after_s
    return ClientError(message, status=status, code=code, type=type, retry_after_s=after_s)


def _client_error(error: RequestError | RequestFailed) -> ClientError:
    """The ClientError that the same call to a server would raise."""
    if isinstance(error, RequestRefused | RequestFailed):
        return unserved_error(error.end, str(error))
    return ClientError(str(error), status=400, type="invalid_request_error")


def _no_embeddings() -> ClientError:
    cause = "this client has no embeddings: name default_embedding_model when you create it"
    return ClientError(cause, code=NOT_OFFERED)


def _unknown_model(model: str | None, known: str) -> ClientError:
    cause = f"model: {model!r} is not served here; the graph has {known!r}"
    return ClientError(cause, status=404, code="model_not_found", param="model")


class _EmbeddedGraph:
    """The base of both services: a shipped graph, opened by the subclass.

    `model` generates, `embedding` embeds; None: the graph's own model generates, and none embeds.
    """

    def __init__(self, model: str | None, embedding: str | None = None) -> None:
        graph = Graph.load(GRAPH if embedding is None else TWO_MODELS)
        engine = graph.ir.engines["g"]
        assert isinstance(engine, FrozenMap)
        self._model = model or str(engine["model"])
        self._embedding = embedding
        chosen = {"g.model": self._model, "e.model": embedding}
        self._opened = graph.open(set={"g.model": self._model} if embedding is None else chosen)
        self._session: Any = None

    def _check_embedding(self, model: str | None) -> None:
        """Raise ClientError unless the graph has this model that embeds; None: any."""
        if self._embedding is None:
            raise _no_embeddings()
        if model not in (None, self._embedding):
            raise _unknown_model(model, self._embedding)

    @property
    def _models(self) -> list[str]:
        return [self._model] if self._embedding is None else [self._model, self._embedding]

    def _read(
        self, path: str, call: Mapping[str, Any], options: Mapping[str, Any], model: str | None
    ) -> SessionCall:
        if model not in (None, self._model):
            raise _unknown_model(model, self._model)
        try:
            return read_call(path, call, options, self._session)
        except RequestError as error:
            raise _client_error(error) from error
        except ApiError as error:
            raise ClientError(
                error.message,
                status=error.status,
                code=error.code,
                type=error.type,
                param=error.param,
            ) from None

    def _status(self) -> dict[str, Any]:
        return {
            "mode": "embedded",
            "url": None,
            "is_ready": True,
            "models": self._models,
            "server_load": self._session.statistics().num_open,
            "version": sagellm.__version__,
        }


class Embedded(_EmbeddedGraph):
    """The service for plain threads. Creating an instance opens the graph."""

    def __init__(self, model: str | None, embedding: str | None = None) -> None:
        super().__init__(model, embedding)
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
        """The whole text, or a stream once the graph has accepted the request."""
        read = self._read(path, call, options, model)
        try:
            if stream:
                return self._streamed(read)
            answers = self._session.generate_all(read.prompt, sampling=read.sampling, **read.fields)
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return reply_of(answers, self._model, read)

    def models(self) -> list[str]:
        return self._models

    def status(self) -> dict[str, Any]:
        return self._status()

    def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        self._check_embedding(model)
        try:
            found: list[list[float]] = self._session.embed(texts, model=EMBEDDER)
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return found

    def close(self) -> None:
        """Cancel running requests, and free the engine. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._opened.__exit__(None, None, None)

    def _streamed(self, read: SessionCall) -> ReplyStream:
        usage = StreamUsage(read)
        events = self._session.stream(read.prompt, sampling=read.sampling, **read.fields)
        try:
            # Wait for the first event, so that the call raises a refusal, as over HTTP.
            first = usage.piece_of(next(events))
        except BaseException:  # no caller has the stream yet: close it here
            events.__exit__()
            raise

        def pieces() -> Iterator[Piece]:
            yield first
            yield from map(usage.piece_of, events)

        return ReplyStream(pieces(), events.__exit__)


class AsyncEmbedded(_EmbeddedGraph):
    """The service for trio and asyncio. The same task must open and close the graph."""

    async def open(self) -> None:
        self._session = await self._opened.__aenter__()

    async def aclose(self, *error: Any) -> None:
        """Cancel running requests, and free the engine. Idempotent."""
        if self._session is not None:
            self._session = None  # before the await: a second call must not close again
            await self._opened.__aexit__(*(error or (None, None, None)))

    async def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | AsyncReplyStream:
        """The whole text, or a stream once the graph has accepted the request."""
        read = self._read(path, call, options, model)
        try:
            if stream:
                return await self._streamed(read)
            answers = await self._session.generate_all(
                read.prompt, sampling=read.sampling, **read.fields
            )
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return reply_of(answers, self._model, read)

    async def models(self) -> list[str]:
        return self._models

    async def status(self) -> dict[str, Any]:
        return self._status()

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        self._check_embedding(model)
        try:
            found: list[list[float]] = await self._session.embed(texts, model=EMBEDDER)
        except (RequestError, RequestFailed) as error:
            raise _client_error(error) from error
        return found

    async def _streamed(self, read: SessionCall) -> AsyncReplyStream:
        usage = StreamUsage(read)
        events = self._session.stream(read.prompt, sampling=read.sampling, **read.fields)
        try:
            first = usage.piece_of(await anext(events))
        except BaseException:  # no caller has the stream yet: close it here
            await events.aclose()
            raise
        return AsyncReplyStream(_AsyncPieces(first, events, usage), events.aclose)


class _AsyncPieces:
    """The pieces of a stream whose first piece was awaited before, so that the call itself raises a
    refusal.
    """

    def __init__(self, first: Piece, events: AsyncIterator[Output], usage: StreamUsage) -> None:
        self._first: Piece | None = first
        self._events = events
        self._usage = usage

    def __aiter__(self) -> "_AsyncPieces":
        return self

    async def __anext__(self) -> Piece:
        first, self._first = self._first, None
        return first if first is not None else self._usage.piece_of(await anext(self._events))
