"""The door: how the HTTP app, on whatever loop, reaches the graph's source and sink."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from sagellm.runtime.messages import Sampling, TokenEvent


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the gateway hands it to the graph. Times in seconds."""

    request_id: str
    text: str  # of the prompt, which a map before the model may rewrite
    token_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] = ()  # instead of a text, where the engine takes text
    sampling: Sampling
    priority: int = 2
    tenant: str = ""
    model: str = ""
    salt: str = ""
    slo_ttft_s: float | None = None
    timeout_s: float | None = None
    waited_s: float = 0.0  # since its body was read
    trace: str = ""  # W3C traceparent, if any
    operation: str = "text_completion"  # or "chat", as traces call it


class Door(Protocol):
    """A graph that is open. All methods are called from the loop that the app runs on."""

    def enter(
        self, entry: Entry
    ) -> AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]]:
        """Start a request. Yields what has come since the last batch, in order, never empty.

        Every choice ends with exactly one event that has a `finish_reason`. Leaving the context
        cancels what is unfinished. A request whose reader leaves more than the settings' tokens or
        bytes unread is cancelled; what was buffered may still be read, and its last event has
        finish reason "cancelled" and code "slow_reader".
        Raises ApiError where the graph cannot take it at all.
        """

    async def cancel(self, request_id: str) -> bool:
        """End a request from outside; False where it is not known."""

    async def cancel_elsewhere(self, call_id: str) -> bool:
        """End all requests of a call that another gateway before the same graph has; False where
        none knows it.
        """
