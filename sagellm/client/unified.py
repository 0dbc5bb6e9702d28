"""`UnifiedInferenceClient`: chat, generate and embed, wherever the model is served."""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, overload

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
from sagellm.client.replies import ReplyStream, TextReply
from sagellm.client.responses import CLOSED, MISUSED, ClientError
from sagellm.client.server import ServerConnection, find_server
from sagellm.errors import blocked_loop, misused

TIMEOUT_S = 60.0


class InferenceService(Protocol):
    """Whatever answers: a server over HTTP, or a graph in this process."""

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
    """A client for plain threads; any number of them may use it at once.

    Every call raises ClientError where it is not answered. Options of `chat` and `generate` have
    the names of the OpenAI API and go to the server as they are. `timeout` is how many seconds the
    server may be silent. Nothing is tried twice: `ClientError.retry_after_s` says when to.
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
        """A client of the server at a URL; else of SAGELLM_URL; else of a server on this machine.

        `embedded` opens the shipped graph `joint` in this process instead, with
        `default_llm_model` as its model. The key is `api_key` or SAGELLM_API_KEY. A call without a
        model takes the default, or else the first that the server names. Raises ClientError where
        no server is found.
        """
        served: InferenceService
        if embedded:
            _check_place("UnifiedInferenceClient.create(embedded=True)")
            check_embedded(control_plane_url)
            served = import_module("sagellm.client.embedded").Embedded(default_llm_model)
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
        **options: Any,
    ) -> TextReply: ...
    @overload
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> ReplyStream: ...
    def chat(
        self,
        messages: Messages,
        model: str | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> TextReply | ReplyStream:
        """The next message of a conversation: its text, or with `stream` its pieces as they come.

        The text is a `str` that knows `finish_reason`, `usage` and, for n > 1, `choices`.
        """
        call = {"messages": list(messages)}
        return self._ready("chat").ask(CHAT, call, options, model or self._llm, stream)

    @overload
    def generate(
        self,
        prompt: Prompt,
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> TextReply: ...
    @overload
    def generate(
        self, prompt: Prompt, model: str | None = None, *, stream: Literal[True], **options: Any
    ) -> ReplyStream: ...
    def generate(
        self, prompt: Prompt, model: str | None = None, *, stream: bool = False, **options: Any
    ) -> TextReply | ReplyStream:
        """What follows a prompt (text or token ids), as `chat` gives it."""
        call = {"prompt": prompt}
        return self._ready("generate").ask(COMPLETIONS, call, options, model or self._llm, stream)

    def embed(self, texts: str | Iterable[str], model: str | None = None) -> list[list[float]]:
        """A vector for each text. Raises ClientError where the server has no embeddings."""
        return self._ready("embed").embed(texts_of(texts), model or self._embedding)

    def models(self) -> list[str]:
        """The names of the models that are served."""
        return self._ready("models").models()

    def get_status(self) -> dict[str, Any]:
        """mode, url, is_ready, models, server_load (open requests), version; None: not told."""
        return self._ready("get_status").status()

    def close(self) -> None:
        """End what runs, and leave the server or close the graph. Idempotent."""
        self._is_closed = True
        self._served.close()

    def __enter__(self) -> "UnifiedInferenceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self, method: str) -> InferenceService:
        """What answers. Raises ClientError in an async loop, and after `close`."""
        _check_place(f"UnifiedInferenceClient.{method}")
        if self._is_closed:
            raise ClientError(CLOSED, code=MISUSED)
        return self._served


def _check_place(call: str) -> None:
    """Raise ClientError where a blocking call would stop every task of a loop."""
    fault = blocked_loop(call, "AsyncUnifiedInferenceClient, whose methods are awaited")
    if fault is not None:
        raise ClientError(fault, code=MISUSED)
