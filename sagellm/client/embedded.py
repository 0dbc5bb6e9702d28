"""A graph that is open in this process, for the clients; loaded only when one is asked for."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import sagellm
from sagellm.builder import Graph
from sagellm.client.answers import Piece, Reply
from sagellm.client.events import Tally, read_call, reply_of, unserved
from sagellm.client.failure import NOT_OFFERED, ClientError
from sagellm.client.streams import AsyncStream, Stream
from sagellm.graphs.ir import FrozenMap
from sagellm.session import Output, RequestError, RequestFailed, RequestRefused

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


def _wrong(error: RequestError | RequestFailed) -> ClientError:
    """The error that a server would answer with."""
    if isinstance(error, RequestRefused | RequestFailed):
        return unserved(error.end, str(error))
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
    ) -> Reply | Stream:
        """One call for text: whole, or as it comes once the graph has accepted it."""
        _check_model(model, self._model)
        read = read_call(path, call, options, self._session)
        try:
            if stream:
                return self._streamed(read.prompt, read.sampling, read.fields)
            answers = self._session.generate_all(read.prompt, sampling=read.sampling, **read.fields)
        except (RequestError, RequestFailed) as error:
            raise _wrong(error) from error
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

    def _streamed(self, prompt: Any, sampling: Any, fields: dict[str, Any]) -> Stream:
        tally = Tally(sampling.n)
        events = self._session.stream(prompt, sampling=sampling, **fields)
        try:
            first = tally.piece_of(next(events))
        except BaseException:  # nobody has the stream yet who would close it
            events.__exit__()
            raise

        def pieces() -> Iterator[Piece]:
            yield first
            yield from map(tally.piece_of, events)

        return Stream(pieces(), events.__exit__)


class _Pieces:
    """A stream's pieces behind the first, which was awaited to learn of a refusal."""

    def __init__(self, first: Piece, events: AsyncIterator[Output], tally: Tally) -> None:
        self._first: Piece | None = first
        self._events = events
        self._tally = tally

    def __aiter__(self) -> "_Pieces":
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
    ) -> Reply | AsyncStream:
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
            raise _wrong(error) from error
        return reply_of(answers, self._model)

    async def models(self) -> list[str]:
        return [self._model]

    async def status(self) -> dict[str, Any]:
        return _status(self._model, self._session)

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        raise _without_embeddings()

    async def _streamed(self, prompt: Any, sampling: Any, fields: dict[str, Any]) -> AsyncStream:
        tally = Tally(sampling.n)
        events = self._session.stream(prompt, sampling=sampling, **fields)
        try:
            first = tally.piece_of(await anext(events))
        except BaseException:  # nobody has the stream yet who would close it
            await events.aclose()
            raise
        return AsyncStream(_Pieces(first, events, tally), events.aclose)
