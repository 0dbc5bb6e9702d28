"""One streamed answer on the terminal, with what it took."""

import sys
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from sagellm.cli.interrupt import draining
from sagellm.client.answers import Piece, Usage
from sagellm.client.streams import AsyncStream


@dataclass(slots=True)
class Told:
    """An answer, as far as it came. Times in seconds."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    num_pieces: int = 0  # with text
    ttft_s: float | None = None
    last_s: float | None = None  # of its last token
    is_stopped: bool = False

    @property
    def num_tokens(self) -> int:
        """As the server counted, or else one a piece."""
        counted = self.usage.completion_tokens if self.usage else None
        return self.num_pieces if counted is None else counted

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token behind the first."""
        if self.ttft_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """From the call to the last token."""
        return self.num_tokens / self.last_s if self.last_s else None

    def take(self, piece: Piece, after_s: float) -> None:
        if piece or piece.finish_reason is not None:  # an EOS has no text
            self.ttft_s = after_s if self.ttft_s is None else self.ttft_s
            self.last_s = after_s
        self.num_pieces += bool(piece)
        self.text += piece
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage


async def tell(asking: Awaitable[AsyncStream], *, silent: bool = False) -> Told:
    """Print the answer while it comes. Ctrl-C cancels it; what came is kept.

    Raises ClientError.
    """
    told, started_s = Told(), trio.current_time()
    with trio.CancelScope() as scope:
        async with draining(scope, "\nstopped"), await asking as stream:
            async for piece in stream:
                told.take(piece, trio.current_time() - started_s)
                if not silent:
                    print(piece, end="", flush=True)
    told.is_stopped = scope.cancelled_caught
    if not silent:
        print(flush=True)
    return told


def show_cost(told: Told) -> None:
    """One line on stderr: tokens, TTFT, time a token, tokens a second."""
    parts = [f"{told.num_tokens} tokens"]
    if told.usage is not None and told.usage.prompt_tokens is not None:
        parts.insert(0, f"prompt {told.usage.prompt_tokens} tokens")
    if told.ttft_s is not None:
        parts.append(f"TTFT {told.ttft_s * 1e3:.1f} ms")
    if told.tpot_s is not None:
        parts.append(f"TPOT {told.tpot_s * 1e3:.1f} ms")
    if told.tokens_per_s is not None:
        parts.append(f"{told.tokens_per_s:.1f} tokens/s")
    print(", ".join(parts), file=sys.stderr)


def print_json(told: Told, model: str) -> None:
    """The answer and its figures as one object."""
    timing = {name: getattr(told, name) for name in ("ttft_s", "tpot_s", "tokens_per_s")}
    said: dict[str, Any] = {
        "model": model,
        "text": told.text,
        "finish_reason": told.finish_reason,
        "usage": told.usage,
        "timing": timing,
    }
    print(msgspec.json.encode(said).decode())
