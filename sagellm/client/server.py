"""One server over HTTP, for plain threads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import httpx2

from sagellm.client import asking
from sagellm.client.answers import Piece, Reply, StreamReader, pieces, read_body, reply
from sagellm.client.failure import ClientError, refused, translated
from sagellm.client.finding import LOCAL, PROBE_S, headers, is_server, nobody, transport_options
from sagellm.client.streams import Stream

JSON = {"Content-Type": "application/json"}


def find_server() -> str:
    """The first local address where an OpenAI-compatible server answers. Raises ClientError."""
    found = next((url for url in LOCAL if _answers(url)), None)
    if found is None:
        raise nobody()
    return found


def _answers(url: str) -> bool:
    with suppress(httpx2.HTTPError), httpx2.Client(trust_env=False, timeout=PROBE_S) as probe:
        answer = probe.get(f"{url}{asking.MODELS}", headers=headers(None))
        return is_server(answer.status_code, answer.content)
    return False


class Server:
    """Connections to one server; any number of threads may use them at once."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = url
        options: Any = transport_options(url, api_key, timeout_s)
        self._http = httpx2.Client(**options)
        self._first: str | None = None

    def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> Reply | Stream:
        """One call for text: whole, or as it comes once the server has accepted it."""
        content = asking.encode(call, options, model or self._first_model(), stream)
        response = self._send("POST", path, content)
        if stream:
            return self._streamed(response)
        return reply(read_body(self._read(response)))

    def models(self) -> list[str]:
        return asking.model_ids(self._get(asking.MODELS))

    def status(self) -> dict[str, Any]:
        """What the server tells of itself; what it does not offer is None."""
        is_ready = self._offered(asking.HEALTH) is not None
        load, version = self._offered(asking.LOAD), self._offered(asking.VERSION)
        return asking.status(self.url, self.models(), is_ready, load, version)

    def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]:
        call = {"model": model or self._first_model(), "input": list(texts)}
        try:
            response = self._send("POST", asking.EMBEDDINGS, asking.encode_plain(call))
            return asking.vectors(self._read(response))
        except ClientError as error:
            raise asking.without_embeddings(error) from error

    def close(self) -> None:
        self._http.close()

    def _first_model(self) -> str:
        if self._first is None:
            self._first = asking.first_of(self.models())
        return self._first

    def _get(self, path: str) -> bytes:
        return self._read(self._send("GET", path))

    def _offered(self, path: str) -> bytes | None:
        """The answer of an endpoint that a server may lack, or refuse."""
        try:
            return self._get(path)
        except ClientError as error:
            if error.status is None:
                raise
            return None

    def _send(self, method: str, path: str, content: bytes | None = None) -> httpx2.Response:
        """An answer that is accepted and not read yet. Raises ClientError."""
        with translated(self.url):
            extra = JSON if content is not None else None
            request = self._http.build_request(method, path, content=content, headers=extra)
            response = self._http.send(request, stream=True)
        if not response.is_success:
            raise refused(response.status_code, response.headers, self._read(response))
        return response

    def _read(self, response: httpx2.Response) -> bytes:
        with translated(self.url), closing(response):
            return response.read()

    def _streamed(self, response: httpx2.Response) -> Stream:
        if asking.is_stream(response.headers):
            return Stream(self._pieces(response), response.close)
        raise asking.not_streamed(self._read(response))

    def _pieces(self, response: httpx2.Response) -> Iterator[Piece]:
        reader = StreamReader()
        body = response.iter_bytes()
        with closing(response):
            while not reader.is_over:
                with translated(self.url):
                    data = next(body, None)
                reader.end() if data is None else reader.feed(data)
                while (chunk := reader.next()) is not None:
                    yield from pieces(chunk)
