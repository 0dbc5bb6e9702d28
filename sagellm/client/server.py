"""The service of a client for a server over HTTP, for plain threads and for async code."""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from typing import Any

import httpx2

from sagellm.client import http_calls
from sagellm.client.http_calls import (
    LOCAL,
    PROBE_S,
    is_server,
    no_server,
    request_headers,
    transport_options,
)
from sagellm.client.replies import Piece, TextReply, Usage, read_body, whole_reply
from sagellm.client.reply_streams import AsyncReplyStream, ChunkReader, ReplyStream, chunk_pieces
from sagellm.client.responses import BodyBytes, ClientError, raising_client_errors, response_error

_JSON_HEADERS = {"Content-Type": "application/json"}


def find_server() -> str:
    """The first local address of an OpenAI-compatible server. Raises ClientError."""
    found = next((url for url in LOCAL if _answers(url)), None)
    if found is None:
        raise no_server()
    return found


def _answers(url: str) -> bool:
    # A proxy cannot reach a local address, so the environment is ignored.
    with suppress(httpx2.HTTPError), httpx2.Client(trust_env=False, timeout=PROBE_S) as probe:
        answer = probe.get(f"{url}{http_calls.MODELS}", headers=request_headers(None))
        return is_server(answer.status_code, answer.content)
    return False


class ServerConnection:
    """The connections to one server. Any number of threads may use them at once."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = url
        options: Any = transport_options(url, api_key, timeout_s)
        self._http = httpx2.Client(**options)
        self._first: str | None = None
        self._takes_usage = True  # until the server refuses `stream_options`

    def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | ReplyStream:
        """The whole text, or a stream once the server has accepted the request."""
        model = model or self._first_model()
        asked = http_calls.with_usage(options, stream and self._takes_usage)
        try:
            content = http_calls.encode_call(call, asked, model, stream)
            response = self._send("POST", path, content)
        except ClientError as error:
            if asked is options or not http_calls.refuses_usage(error):
                raise
            self._takes_usage = False
            content = http_calls.encode_call(call, options, model, stream)
            response = self._send("POST", path, content)
        if stream:
            return self._streamed(response)
        return whole_reply(read_body(self._read(response)))

    def models(self) -> list[str]:
        return http_calls.read_model_ids(self._get(http_calls.MODELS))

    def status(self) -> dict[str, Any]:
        """The status of the server, with None for endpoints that it does not have."""
        is_ready = self._offered(http_calls.HEALTH) is not None
        load, version = self._offered(http_calls.LOAD), self._offered(http_calls.VERSION)
        return http_calls.server_status(self.url, self.models(), is_ready, load, version)

    def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        call = {"model": model or self._first_model(), "input": list(texts)}
        try:
            response = self._send("POST", http_calls.EMBEDDINGS, http_calls.encode_json(call))
            return http_calls.read_embeddings(self._read(response))
        except ClientError as error:
            raise http_calls.without_embeddings(error) from error

    def close(self) -> None:
        self._http.close()

    def _first_model(self) -> str:
        if self._first is None:
            self._first = http_calls.first_model_of(self.models())
        return self._first

    def _get(self, path: str) -> bytes:
        return self._read(self._send("GET", path))

    def _offered(self, path: str) -> bytes | None:
        """The answer of an optional endpoint; None if the server lacks or refuses it."""
        try:
            return self._get(path)
        except ClientError as error:
            if error.status is None:  # the server is unreachable, not just without the endpoint
                raise
            return None

    def _send(self, method: str, path: str, content: bytes | None = None) -> httpx2.Response:
        """Send a call, and return the open response, which the caller must close.

        Raises ClientError for an error response.
        """
        with raising_client_errors(self.url):
            extra = _JSON_HEADERS if content is not None else None
            request = self._http.build_request(method, path, content=content, headers=extra)
            response = self._http.send(request, stream=True)  # the body of an error is read below
        if not response.is_success:
            raise response_error(response.status_code, response.headers, self._read(response))
        return response

    def _read(self, response: httpx2.Response) -> bytes:
        with raising_client_errors(self.url), closing(response):
            return response.read()

    def _streamed(self, response: httpx2.Response) -> ReplyStream:
        if http_calls.is_stream(response.headers):
            return ReplyStream(self._pieces(response), response.close)
        raise http_calls.not_streamed(self._read(response))

    def _pieces(self, response: httpx2.Response) -> Iterator[Piece | Usage]:
        reader = ChunkReader()
        body = response.iter_bytes()
        with closing(response):
            while not reader.is_over:
                with raising_client_errors(self.url):
                    data = next(body, None)
                reader.end() if data is None else reader.feed(data)
                while (chunk := reader.next()) is not None:
                    yield from chunk_pieces(chunk)


async def find_server_async() -> str:
    """The first local address of an OpenAI-compatible server. Raises ClientError."""
    for url in LOCAL:
        if await _answers_async(url):
            return url
    raise no_server()


async def _answers_async(url: str) -> bool:
    with suppress(httpx2.HTTPError):
        async with httpx2.AsyncClient(trust_env=False, timeout=PROBE_S) as probe:
            answer = await probe.get(f"{url}{http_calls.MODELS}", headers=request_headers(None))
            return is_server(answer.status_code, answer.content)
    return False


class AsyncServerConnection:
    """The connections to one server, for the tasks of one event loop."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout_s: float,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url
        options: Any = transport_options(url, api_key, timeout_s)
        self._http = httpx2.AsyncClient(**options, transport=transport)
        self._first: str | None = None
        self._takes_usage = True  # until the server refuses `stream_options`

    async def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | AsyncReplyStream:
        """The whole text, or a stream once the server has accepted the request."""
        model = model or await self.first_model()
        asked = http_calls.with_usage(options, stream and self._takes_usage)
        try:
            content = http_calls.encode_call(call, asked, model, stream)
            response = await self.send("POST", path, content)
        except ClientError as error:
            if asked is options or not http_calls.refuses_usage(error):
                raise
            self._takes_usage = False
            content = http_calls.encode_call(call, options, model, stream)
            response = await self.send("POST", path, content)
        if stream:
            return await self._streamed(response)
        return whole_reply(read_body(await self.read(response)))

    async def models(self) -> list[str]:
        return http_calls.read_model_ids(await self._get(http_calls.MODELS))

    async def status(self) -> dict[str, Any]:
        """The status of the server, with None for endpoints that it does not have."""
        is_ready = await self._offered(http_calls.HEALTH) is not None
        load, version = (
            await self._offered(http_calls.LOAD),
            await self._offered(http_calls.VERSION),
        )
        return http_calls.server_status(self.url, await self.models(), is_ready, load, version)

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        call = {"model": model or await self.first_model(), "input": list(texts)}
        try:
            response = await self.send("POST", http_calls.EMBEDDINGS, http_calls.encode_json(call))
            return http_calls.read_embeddings(await self.read(response))
        except ClientError as error:
            raise http_calls.without_embeddings(error) from error

    async def aclose(self) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The first model of the server. The first call asks the server; later calls do not."""
        if self._first is None:
            self._first = http_calls.first_model_of(await self.models())
        return self._first

    async def send(self, method: str, path: str, content: bytes | None = None) -> httpx2.Response:
        """Send a call, and return the open response, which the caller must close.

        Raises ClientError for an error response.
        """
        with raising_client_errors(self.url):
            extra = _JSON_HEADERS if content is not None else None
            request = self._http.build_request(method, path, content=content, headers=extra)
            response = await self._http.send(request, stream=True)  # an error is read below
        if not response.is_success:
            raise response_error(response.status_code, response.headers, await self.read(response))
        return response

    async def _get(self, path: str) -> bytes:
        return await self.read(await self.send("GET", path))

    async def _offered(self, path: str) -> bytes | None:
        """The answer of an optional endpoint; None if the server lacks or refuses it."""
        try:
            return await self._get(path)
        except ClientError as error:
            if error.status is None:
                raise
            return None

    async def read(self, response: httpx2.Response) -> bytes:
        """Read the whole body, and close the response. Raises ClientError."""
        with raising_client_errors(self.url):
            async with aclosing(response):
                return await response.aread()

    async def _streamed(self, response: httpx2.Response) -> AsyncReplyStream:
        if not http_calls.is_stream(response.headers):
            raise http_calls.not_streamed(await self.read(response))
        body = BodyBytes(response, self.url)
        generator = _read_pieces(body)

        async def close() -> None:
            await generator.aclose()
            await body.aclose()  # a generator that never started has not closed the body

        return AsyncReplyStream(generator, close)


async def _read_pieces(body: BodyBytes) -> AsyncGenerator[Piece | Usage, None]:
    reader = ChunkReader()
    async with body:
        while not reader.is_over:
            data = await body.next()
            reader.end() if data is None else reader.feed(data)
            while (chunk := reader.next()) is not None:
                for piece in chunk_pieces(chunk):
                    yield piece
        await body.finish()
