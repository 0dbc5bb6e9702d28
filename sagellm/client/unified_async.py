"""`AsyncUnifiedInferenceClient`: chat, generate and embed, for trio and asyncio."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, TypeVar, overload

from sagellm.client.answer_formats import read_format
from sagellm.client.http_calls import (
    CHAT,
    COMPLETIONS,
    Messages,
    Prompt,
    check_embedded,
    configured_key,
    configured_url,
    texts_of,
)
from sagellm.client.python_tools import OnError, ToolCallable
from sagellm.client.replies import TextReply
from sagellm.client.reply_streams import AsyncReplyStream
from sagellm.client.responses import CLOSED, MISUSED, ClientError
from sagellm.client.server import AsyncServerConnection, find_server_async
from sagellm.client.tool_loop import MAX_ROUNDS, ToolLoop, ToolRun
from sagellm.client.unified import TIMEOUT_S
from sagellm.errors import misused

T = TypeVar("T")


class AsyncInferenceService(Protocol):
    """The target of a client's calls: a server over HTTP, or a graph in this process."""

    async def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | AsyncReplyStream: ...

    async def models(self) -> list[str]: ...

    async def status(self) -> dict[str, Any]: ...

    async def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]: ...

    async def aclose(self) -> None: ...


@misused(
    __enter__="AsyncUnifiedInferenceClient is entered with `async with`; "
    "for `with`, use UnifiedInferenceClient"
)
class AsyncUnifiedInferenceClient:
    """A client like `UnifiedInferenceClient`, for the tasks of one event loop.

    The first call looks for the server. An embedded graph is opened and closed by `async with`, in
    one task. `await client.chat(messages, stream=True)` returns a stream, which another `async
    with` closes. Cancelling a call cancels its request.
    """

    def __init__(
        self,
        *,
        url: str | None,
        api_key: str | None,
        embedded: bool,
        default_llm_model: str | None,
        default_embedding_model: str | None,
        timeout: float,
    ) -> None:
        self._url = url
        self._api_key = api_key
        self._is_embedded = embedded
        self._llm = default_llm_model
        self._embedding = default_embedding_model
        self._timeout_s = timeout
        self._found: AsyncInferenceService | None = None
        self._is_closed = False

    @classmethod
    def create(
        cls,
        control_plane_url: str | None = None,
        *,
        embedded: bool = False,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
        timeout: float = TIMEOUT_S,
        api_key: str | None = None,
    ) -> "AsyncUnifiedInferenceClient":
        """Create like `UnifiedInferenceClient.create`, but look for a server at the first call."""
        if embedded:
            check_embedded(control_plane_url, api_key)
        return cls(
            url=None if embedded else configured_url(control_plane_url),
            api_key=configured_key(api_key),
            embedded=embedded,
            default_llm_model=default_llm_model,
            default_embedding_model=default_embedding_model,
            timeout=timeout,
        )

    @overload
    async def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: type[T],
        **options: Any,
    ) -> TextReply[T]: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TextReply: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: type[T],
        **options: Any,
    ) -> AsyncReplyStream[T]: ...
    @overload
    async def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncReplyStream: ...
    async def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: bool = False,
        response_format: Any = None,
        **options: Any,
    ) -> TextReply | AsyncReplyStream:
        """The next message of a conversation: the whole text, or with `stream` its pieces.

        The text is a `str` with attributes `finish_reason`, `usage`, `tool_calls`, `reasoning` and,
        for n > 1, `choices`. `response_format` is a type (msgspec.Struct, dataclass, TypedDict,
        pydantic model) or the dict of the OpenAI API: the answer is JSON, and `parsed` its value.
        `regex`, `choices` or `grammar` bind the text instead. `tools` are dicts or functions, whose
        calls the caller makes; `run_tools` makes the calls itself.
        """
        call = {"messages": list(messages)}
        return await self._ask(CHAT, call, model, stream, response_format, options)

    @overload
    async def run_tools(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        tools: Sequence[ToolCallable],
        response_format: type[T],
        max_rounds: int = MAX_ROUNDS,
        on_error: OnError | None = None,
        **options: Any,
    ) -> ToolRun[T]: ...
    @overload
    async def run_tools(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        tools: Sequence[ToolCallable],
        response_format: Mapping[str, Any] | None = None,
        max_rounds: int = MAX_ROUNDS,
        on_error: OnError | None = None,
        **options: Any,
    ) -> ToolRun: ...
    async def run_tools(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        tools: Sequence[ToolCallable],
        response_format: Any = None,
        max_rounds: int = MAX_ROUNDS,
        on_error: OnError | None = None,
        **options: Any,
    ) -> ToolRun:
        """Chat, make the calls that the model asks for, and chat again, until the model answers.

        `tools` are functions with annotated parameters, async or not; those that are not async run
        in a thread. The calls of one answer run in order. A call that fails gives the model the
        error as its result, or the text that `on_error(call, error)` returns; what `on_error`
        raises ends the loop. The model is asked `max_rounds` times at most, and once more for a
        `response_format`. Raises ToolsUnfinished if it still calls tools.
        """
        options["response_format"] = response_format
        loop = ToolLoop(messages, tools, options, max_rounds=max_rounds, on_error=on_error)
        while True:
            reply: TextReply = await self.chat(loop.messages, model, **loop.fields)
            for call in loop.take(reply):
                loop.add_result(call, await loop.box.run_async(call))
            if loop.is_over:
                return ToolRun(reply, loop.messages)

    @overload
    async def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: type[T],
        **options: Any,
    ) -> TextReply[T]: ...
    @overload
    async def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TextReply: ...
    @overload
    async def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: type[T],
        **options: Any,
    ) -> AsyncReplyStream[T]: ...
    @overload
    async def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncReplyStream: ...
    async def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: bool = False,
        response_format: Any = None,
        **options: Any,
    ) -> TextReply | AsyncReplyStream:
        """The continuation of a prompt (text or token ids), in the form that `chat` returns."""
        call = {"prompt": prompt}
        return await self._ask(COMPLETIONS, call, model, stream, response_format, options)

    async def embed(
        self, texts: str | Iterable[str], model: str | None = None
    ) -> list[list[float]]:
        """One vector for each text. Raises ClientError for a server without embeddings."""
        return await (await self._served()).embed(texts_of(texts), model or self._embedding)

    async def models(self) -> list[str]:
        """The names of the served models."""
        return await (await self._served()).models()

    async def get_status(self) -> dict[str, Any]:
        """The status under the keys mode, url, is_ready, models, server_load (the number of open
        requests) and version. None means unknown.
        """
        return await (await self._served()).status()

    @property
    def url(self) -> str | None:
        """The URL of the server; None before the server is found, and for an embedded graph."""
        return self._url

    async def aclose(self) -> None:
        """Cancel running requests, and close the connections, or the embedded graph. Idempotent."""
        # Before the await: a second `aclose` finds nothing to close.
        found, self._found, self._is_closed = self._found, None, True
        if found is not None:
            await found.aclose()

    async def __aenter__(self) -> "AsyncUnifiedInferenceClient":
        self._is_closed = False  # a closed client may be entered again
        if self._is_embedded and self._found is None:
            opened = import_module("sagellm.client.embedded").AsyncEmbedded(
                self._llm, self._embedding
            )
            await opened.open()
            self._found = opened
        await self._served()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _ask(
        self,
        path: str,
        call: Mapping[str, Any],
        model: str | None,
        stream: bool,
        response_format: object,
        options: Mapping[str, Any],
    ) -> TextReply | AsyncReplyStream:
        served = await self._served()
        asked = read_format(options, response_format)
        return asked.bind(await served.ask(path, call, asked.fields, model or self._llm, stream))

    async def _served(self) -> AsyncInferenceService:
        """The service, found at the first call. Raises ClientError after `aclose`."""
        if self._is_closed:
            raise ClientError(CLOSED, code=MISUSED)
        if self._found is None and self._is_embedded:
            cause = "an embedded graph is opened by `async with`; enter the client first"
            raise ClientError(cause, code=MISUSED)
        if self._found is None:
            self._url = self._url or await find_server_async()
            # Another task may have set the service during the await.
            self._found = self._found or AsyncServerConnection(
                self._url, self._api_key, self._timeout_s
            )
        return self._found
