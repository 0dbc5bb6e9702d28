"""A server that speaks the OpenAI API, as an engine sees it: its models, its health, its calls."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec
import trio

from sagellm.client.http_calls import (
    COMPLETIONS,
    HEALTH,
    MODELS,
    encode_json,
    is_stream,
    not_streamed,
    transport_options,
)
from sagellm.client.replies import ResponseBody
from sagellm.client.reply_streams import ChunkReader
from sagellm.client.responses import (
    BAD_ANSWER,
    TRANSPORT,
    BodyBytes,
    ClientError,
    response_error,
    transport_error,
)

_RESUMING = ("sagellm", "vllm", "sglang")  # owners of models whose chats can go on from a text
_PROBE_S = 5.0


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """The model of a server. `max_model_len`: its context limit in tokens; None: not published.

    `can_resume_chats`: the server knows `continue_final_message`.
    """

    name: str
    max_model_len: int | None
    can_resume_chats: bool


class ForeignServer:
    """Calls one server. `connect_s`: the timeout of a connection. `read_s`: the longest wait for
    the beginning of an answer, and for each of its next parts.
    """

    def __init__(self, url: str, api_key: str | None, *, connect_s: float, read_s: float) -> None:
        self.url = url
        options: dict[str, Any] = {**transport_options(url, api_key, read_s)}
        options["timeout"] = httpx2.Timeout(read_s, connect=connect_s)
        self._client = httpx2.AsyncClient(**options)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def model(self, name: str) -> ForeignModel:
        """The model `name`, or with an empty name the first one. Raises ClientError."""
        listed = _listed(await self._get(MODELS))
        if not listed:
            raise ClientError(f"{self.url} serves no model", code=BAD_ANSWER)
        names = [str(entry.get("id")) for entry in listed]
        if name and name not in names:
            raise ClientError(f"{self.url} has no model {name!r}; it has {', '.join(names)}")
        entry = listed[names.index(name)] if name else listed[0]
        return ForeignModel(
            name or names[0], _max_model_len(entry), entry.get("owned_by") in _RESUMING
        )

    async def gives_token_ids(self, model: str) -> bool:
        """Whether the server answers a prompt of token ids with token ids. Raises ClientError."""
        call = {"model": model, "prompt": [1], "max_tokens": 1, "return_token_ids": True}
        response = await self._request("POST", COMPLETIONS, encode_json(call))
        try:
            choice = msgspec.json.decode(response.content)["choices"][0]
        except (ValueError, TypeError, LookupError):
            return False
        return bool(choice.get("token_ids"))

    async def is_healthy(self) -> bool:
        """Whether the server is up. One without `/health` is asked for its models."""
        with trio.move_on_after(_PROBE_S):
            try:
                await self._get(HEALTH)
            except ClientError as error:
                if error.status not in (404, 405, 501):
                    return error.status in (401, 403)  # it is up, and asks for another key
            else:
                return True
            try:
                await self._get(MODELS)
            except ClientError:
                return False
            return True
        return False

    async def stream(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[tuple[ResponseBody, ...], None]:
        """The chunks of a streamed answer, those that arrived together as one tuple.

        Ends after a whole answer. Raises ClientError, and for an answer that ends early CUT_OFF.
        Closing the iterator closes the call.
        """
        reader = ChunkReader()
        async with self._opened(path, body) as received:
            while not reader.is_over:
                data = await received.next()
                reader.feed(data) if data is not None else reader.end()
                chunks = []
                try:
                    while (chunk := reader.next()) is not None:
                        chunks.append(chunk)
                finally:
                    if chunks:
                        yield tuple(chunks)
            await received.finish()

    @asynccontextmanager
    async def _opened(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[BodyBytes]:
        """Send a call, and yield the bytes of its answer. Leaving the block closes the call.

        Raises ClientError, also for an answer that is no stream.
        """
        headers = {"Content-Type": "application/json"}
        content = encode_json(body)
        request = self._client.build_request("POST", path, content=content, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
            received = BodyBytes(response, self.url)
        except TRANSPORT as error:
            raise transport_error(error, self.url) from error
        try:
            if not (response.is_success and is_stream(response.headers)):
                await self._refuse(response)
            yield received
        finally:
            with trio.CancelScope(shield=True):  # a cancel closes the call, too
                await received.aclose()

    async def _refuse(self, response: httpx2.Response) -> None:
        """Raise ClientError for an answer that is no stream."""
        try:
            whole = await response.aread()
        except TRANSPORT as error:
            raise transport_error(error, self.url) from error
        if not response.is_success:
            raise response_error(response.status_code, response.headers, whole)
        raise not_streamed(whole)

    async def _get(self, path: str) -> bytes:
        return (await self._request("GET", path)).content

    async def _request(
        self, method: str, path: str, content: bytes | None = None
    ) -> httpx2.Response:
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            response = await self._client.request(method, path, content=content, headers=headers)
        except TRANSPORT as error:
            raise transport_error(error, self.url) from error
        if not response.is_success:
            raise response_error(response.status_code, response.headers, response.content)
        return response


def _listed(body: bytes) -> list[dict[str, Any]]:
    try:
        data = msgspec.json.decode(body)["data"]
    except (ValueError, TypeError, KeyError):
        data = None
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise ClientError("/v1/models is no list of models", code=BAD_ANSWER)
    return data


def _max_model_len(entry: Mapping[str, Any]) -> int | None:
    """The published context limit: vLLM and sagellm name it at the top, llama.cpp in `meta`."""
    meta = entry.get("meta") or {}
    found = entry.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
    return found if isinstance(found, int) and found > 0 else None
