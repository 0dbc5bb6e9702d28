"""`UnifiedInferenceClient`: chat, generate and embed, on a server or in this process."""

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
from sagellm.client.reply_streams import ReplyStream
from sagellm.client.responses import CLOSED, MISUSED, ClientError
from sagellm.client.server import ServerConnection, find_server
from sagellm.client.tool_loop import MAX_ROUNDS, ToolLoop, ToolRun
from sagellm.errors import blocked_loop, misused

T = TypeVar("T")

TIMEOUT_S = 60.0  # longest time that a server may send nothing


class InferenceService(Protocol):
    """The target of a client's calls: a server over HTTP, or a graph in this process."""

    def ask(
        self,
        path: str,
        call: Mapping[str, Any],
        options: Mapping[str, Any],
        model: str | None,
        stream: bool,
    ) -> TextReply | ReplyStream: ...

    def models(self) -> list[str]: ...

    def status(self) -> dict[str, Any]: ...

    def embed(self, texts: Sequence[str], model: str | None) -> list[list[float]]: ...

    def close(self) -> None: ...


@misused(
    __aenter__="UnifiedInferenceClient is entered with `with`; "
    "for `async with`, use AsyncUnifiedInferenceClient"
)
class UnifiedInferenceClient:
    """A client for plain threads. Any number of threads may use it at once.

    A failed call raises ClientError. Options of `chat` and `generate` have the names of the OpenAI
    API, and go to the server unchanged. `timeout`: the longest time, in seconds, that the server
    may send nothing. The client never retries; `ClientError.retry_after_s` is the time that the
    server asks it to wait. A stream asks for its `usage`; if the server refuses `stream_options`,
    the client sends this call and later ones without them.
    """

    def __init__(
        self,
        served: InferenceService,
        *,
        default_llm_model: str | None = None,
        default_embedding_model: str | None = None,
    ) -> None:
        self._served = served
        self._llm = default_llm_model
        self._embedding = default_embedding_model
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
    ) -> "UnifiedInferenceClient":
        """Create a client of the server at `control_plane_url`, or else at SAGELLM_URL, or else on
        this machine.

        `embedded` opens a shipped graph in this process instead: `joint` with `default_llm_model`
        as its model, or `embed` if `default_embedding_model` is given too. The API key is
        `api_key`, or else SAGELLM_API_KEY. A call without a model uses the default model, or else
        the first model of the server. Raises ClientError if no server is found.
        """
        served: InferenceService
        if embedded:
            _check_place("UnifiedInferenceClient.create(embedded=True)")
            check_embedded(control_plane_url, api_key)
            # Imported on demand: a client of a server needs neither the gateway nor an engine.
            served = import_module("sagellm.client.embedded").Embedded(
                default_llm_model, default_embedding_model
            )
        else:
            url = configured_url(control_plane_url) or find_server()
            served = ServerConnection(url, configured_key(api_key), timeout)
        return cls(
            served,
            default_llm_model=default_llm_model,
            default_embedding_model=default_embedding_model,
        )

    @overload
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: type[T],
        **options: Any,
    ) -> TextReply[T]: ...
    @overload
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TextReply: ...
    @overload
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: type[T],
        **options: Any,
    ) -> ReplyStream[T]: ...
    @overload
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ReplyStream: ...
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: bool = False,
        response_format: Any = None,
        **options: Any,
    ) -> TextReply | ReplyStream:
        """The next message of a conversation: the whole text, or with `stream` its pieces.

        The text is a `str` with attributes `finish_reason`, `usage`, `tool_calls`, `reasoning` and,
        for n > 1, `choices`. `response_format` is a type (msgspec.Struct, dataclass, TypedDict,
        pydantic model) or the dict of the OpenAI API: the answer is JSON, and `parsed` its value.
        `regex`, `choices` or `grammar` bind the text instead. `tools` are dicts or functions, whose
        calls the caller makes; `run_tools` makes the calls itself.
        """
        call = {"messages": list(messages)}
        return self._ask(CHAT, call, model, stream, response_format, options)

    @overload
    def run_tools(
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
    def run_tools(
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
    def run_tools(
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

        `tools` are functions with annotated parameters, async or not. The calls of one answer run
        in order. A call that fails gives the model the error as its result, or the text that
        `on_error(call, error)` returns; what `on_error` raises ends the loop. The model is asked
        `max_rounds` times at most, and once more for a `response_format`. Raises ToolsUnfinished if
        it still calls tools.
        """
        options["response_format"] = response_format
        loop = ToolLoop(messages, tools, options, max_rounds=max_rounds, on_error=on_error)
        while True:
            reply: TextReply = self.chat(loop.messages, model, **loop.fields)
            for call in loop.take(reply):
                loop.add_result(call, loop.box.run(call))
            if loop.is_over:
                return ToolRun(reply, loop.messages)

    @overload
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: type[T],
        **options: Any,
    ) -> TextReply[T]: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TextReply: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: type[T],
        **options: Any,
    ) -> ReplyStream[T]: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[True],
        response_format: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ReplyStream: ...
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: bool = False,
        response_format: Any = None,
        **options: Any,
    ) -> TextReply | ReplyStream:
        """The continuation of a prompt (text or token ids), in the form that `chat` returns."""
        call = {"prompt": prompt}
        return self._ask(COMPLETIONS, call, model, stream, response_format, options)

    def embed(self, texts: str | Iterable[str], model: str | None = None) -> list[list[float]]:
        """One vector for each text. Raises ClientError for a server without embeddings."""
        return self._ready("embed").embed(texts_of(texts), model or self._embedding)

    def models(self) -> list[str]:
        """The names of the served models."""
        return self._ready("models").models()

    def get_status(self) -> dict[str, Any]:
        """The status under the keys mode, url, is_ready, models, server_load (the number of open
        requests) and version. None means unknown.
        """
        return self._ready("get_status").status()

    def close(self) -> None:
        """Cancel running requests, and close the connections, or the embedded graph. Idempotent."""
        self._is_closed = True
        self._served.close()

    def __enter__(self) -> "UnifiedInferenceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        path: str,
        call: Mapping[str, Any],
        model: str | None,
        stream: bool,
        response_format: object,
        options: Mapping[str, Any],
    ) -> TextReply | ReplyStream:
        served = self._ready("generate" if path == COMPLETIONS else "chat")
        asked = read_format(options, response_format)
        return asked.bind(served.ask(path, call, asked.fields, model or self._llm, stream))

    def _ready(self, method: str) -> InferenceService:
        """The service. Raises ClientError in an event loop, and after `close`."""
        _check_place(f"UnifiedInferenceClient.{method}")
        if self._is_closed:
            raise ClientError(CLOSED, code=MISUSED)
        return self._served


def _check_place(call: str) -> None:
    """Raise ClientError inside an event loop: a blocking call would stop all tasks of the loop."""
    fault = blocked_loop(call, "AsyncUnifiedInferenceClient, whose methods are awaited")
    if fault is not None:
        raise ClientError(fault, code=MISUSED)
