"""One server over HTTP, for trio and asyncio."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import httpx2

from sagellm.client import asking
from sagellm.client.answers import Piece, Reply, StreamReader, pieces, read_body, reply
from sagellm.client.failure import ClientError, refused, translated
from sagellm.client.finding import LOCAL, PROBE_S, headers, is_server, nobody, transport_options
from sagellm.client.server import JSON
from sagellm.client.sse import BodyBytes
from sagellm.client.streams import AsyncStream


async def find_server() -> str:
    """The first local address where an OpenAI-compatible server answers. Raises ClientError."""
    for url in LOCAL:
        if await _answers(url):
            return url
    raise nobody()


async def _answers(url: str) -> bool:
    with suppress(httpx2.HTTPError):
        async with httpx2.AsyncClient(trust_env=False, timeout=PROBE_S) as probe:
            answer = await probe.get(f"{url}{asking.MODELS}", headers=headers(None))
            return is_server(answer.status_code, answer.content)
    return False


class AsyncServer:
    """Connections to one server, for the tasks of one event loop."""

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

    async def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> Reply | AsyncStream:
        """One call for text: whole, or as it comes once the server has accepted it."""
        content = asking.encode(call, options, model or await self.first_model(), stream)
        response = await self.send("POST", path, content)
        if stream:
            return await self._streamed(response)
        return reply(read_body(await self.read(response)))

    async def models(self) -> list[str]:
        return asking.model_ids(await self._get(asking.MODELS))

    async def status(self) -> dict[str, Any]:
        """What the server tells of itself; what it does not offer is None."""
        is_ready = await self._offered(asking.HEALTH) is not None
        load, version = await self._offered(asking.LOAD), await self._offered(asking.VERSION)
        return asking.status(self.url, await self.models(), is_ready, load, version)

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        call = {"model": model or await self.first_model(), "input": list(texts)}
        try:
            response = await self.send("POST", asking.EMBEDDINGS, asking.encode_plain(call))
            return asking.vectors(await self.read(response))
        except ClientError as error:
            raise asking.without_embeddings(error) from error

    async def aclose(self) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The model that the server names first; asked once."""
        if self._first is None:
            self._first = asking.first_of(await self.models())
        return self._first

    async def send(self, method: str, path: str, content: bytes | None = None) -> httpx2.Response:
        """An answer that is accepted and not read yet: to be closed. Raises ClientError."""
        with translated(self.url):
            extra = JSON if content is not None else None
            request = self._http.build_request(method, path, content=content, headers=extra)
            response = await self._http.send(request, stream=True)
        if not response.is_success:
            raise refused(response.status_code, response.headers, await self.read(response))
        return response

    async def _get(self, path: str) -> bytes:
        return await self.read(await self.send("GET", path))

    async def _offered(self, path: str) -> bytes | None:
        """The answer of an endpoint that a server may lack, or refuse."""
        try:
            return await self._get(path)
        except ClientError as error:
            if error.status is None:
                raise
            return None

    async def read(self, response: httpx2.Response) -> bytes:
        """The whole body; the answer is closed then. Raises ClientError."""
        with translated(self.url):
            async with aclosing(response):
                return await response.aread()

    async def _streamed(self, response: httpx2.Response) -> AsyncStream:
        if not asking.is_stream(response.headers):
            raise asking.not_streamed(await self.read(response))
        body = BodyBytes(response, self.url)
        generator = _pieces(body)

        async def close() -> None:
            await generator.aclose()
            await body.aclose()

        return AsyncStream(generator, close)


async def _pieces(body: BodyBytes) -> AsyncGenerator[Piece, None]:
    reader = StreamReader()
    async with body:
        while not reader.is_over:
            data = await body.next()
            reader.end() if data is None else reader.feed(data)
            while (chunk := reader.next()) is not None:
                for piece in pieces(chunk):
                    yield piece
        await body.finish()
