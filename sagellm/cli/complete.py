"""`sagellm complete`, and the code that it shares with `chat`: server options, streams, errors."""

import re
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, TextIO

import msgspec
import trio
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from sagellm.cli.errors import (
    CONFIGURATION,
    FAILED,
    INTERRUPTED,
    RESOURCES,
    Failure,
    drain_on_interrupt,
)
from sagellm.cli.grammar_options import GrammarOptions
from sagellm.client.http_calls import KEY_VARIABLE, first_model_of
from sagellm.client.replies import Piece, TextReply, Usage
from sagellm.client.reply_streams import AsyncReplyStream
from sagellm.client.responses import MISUSED, NOT_OFFERED, TIMED_OUT, UNREACHABLE, ClientError
from sagellm.client.unified_async import AsyncUnifiedInferenceClient
from sagellm.load import REFUSALS

_KEY_FIX = f"give --api-key, or set {KEY_VARIABLE}"
_FIXES = {
    UNREACHABLE: "start one with `sagellm serve`, or give --url",
    TIMED_OUT: "look at the server, or raise --timeout",
    NOT_OFFERED: "change the command, or choose another server",
}
# Field of a call that binds an answer -> the option that the field is made of.
_OPTIONS_OF_FIELDS = {
    "response_format": "--json-schema",
    "structured_outputs.regex": "--regex",
    "structured_outputs.choice": "--choice",
    "structured_outputs.grammar": "--grammar",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # not tab and line breaks
_MISTAKES = (400, 401, 403, 404, 405, 413, 422)  # HTTP statuses that the caller can avoid


@Parameter(name="*", group="Server")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The OpenAI-compatible server that a command talks to."""

    url: str | None = None
    """Its URL [default: SAGELLM_URL, or else a server on this machine at port 8000 or 8889]."""

    model: str | None = None
    """The model [default: the first that the server names]."""

    api_key: str | None = None
    """The key [default: SAGELLM_API_KEY, which other users of this machine cannot see]."""

    timeout: Annotated[float, Parameter(validator=Number(gt=0))] = 60.0
    """How many seconds the server may be silent."""

    def client(self) -> AsyncUnifiedInferenceClient:
        return AsyncUnifiedInferenceClient.create(
            self.url,
            default_llm_model=self.model,
            timeout=self.timeout,
            api_key=self.api_key,
        )


@Parameter(name="*", group="How to answer")
@dataclass(frozen=True, kw_only=True)
class RequestSamplingOptions:
    """Sampling of an answer. An option that is not given has the server's default."""

    max_tokens: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    """The longest answer, in tokens."""

    temperature: Annotated[float | None, Parameter(validator=Number(gte=0, lte=100))] = None
    """0 always takes the likeliest token."""

    top_p: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1))] = None
    """Draw from the likeliest tokens that have this much probability together."""

    seed: int | None = None
    """Makes an answer with a temperature repeatable."""

    @property
    def given(self) -> dict[str, Any]:
        """The options that the user gave."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(slots=True)
class StreamedAnswer:
    """The received part of an answer. Times are in seconds since the call."""

    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    reply: TextReply | None = None  # the whole answer, when the stream has ended
    num_pieces: int = 0  # pieces with a part of the answer
    ttft_s: float | None = None
    last_s: float | None = None  # the time of the last token
    is_stopped: bool = False

    @property
    def num_tokens(self) -> int:
        """The completion tokens that the server reports, or else the number of pieces."""
        counted = self.usage.completion_tokens if self.usage else None
        return self.num_pieces if counted is None else counted

    @property
    def calls_tools(self) -> bool:
        return self.reply is not None and bool(self.reply.tool_calls)

    @property
    def tpot_s(self) -> float | None:
        """The mean seconds per token after the first token; None for fewer than two tokens."""
        if self.ttft_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def tokens_per_s(self) -> float | None:
        """The tokens per second between the call and the last token; None without a token."""
        return self.num_tokens / self.last_s if self.last_s else None

    def take(self, piece: Piece, after_s: float) -> None:
        has_part = bool(piece or piece.reasoning or piece.tool_calls)
        if has_part or piece.finish_reason is not None:  # an EOS token has no text
            self.ttft_s = after_s if self.ttft_s is None else self.ttft_s
            self.last_s = after_s
        self.num_pieces += has_part
        self.text += piece
        self.finish_reason = piece.finish_reason or self.finish_reason


def complete(
    text: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    server: ServerOptions = ServerOptions(),
    sampling: RequestSamplingOptions = RequestSamplingOptions(),
    grammar: GrammarOptions = GrammarOptions(),  # noqa: B008 - frozen
    stats: bool = False,
    json: bool = False,
) -> int:
    """Print the continuation of a text, while it comes; Ctrl-C stops it.

    Parameters
    ----------
    text
        The text; `-` reads it from stdin.
    stats
        Say on stderr how many tokens came, when the first, and how many a second.
    json
        Print one object when the answer is whole: model, text, finish_reason, usage, timing.
    """
    prompt = read_text(text, "TEXT")
    options = {**sampling.given, **grammar.fields}
    with translate_client_errors():
        model, answer = trio.run(_complete, prompt, server, options, json)
    if json and not answer.is_stopped:
        print_answer(answer, model)
    if stats:
        show_stats(answer)
    return INTERRUPTED if answer.is_stopped else 0


async def _complete(
    prompt: str, server: ServerOptions, options: dict[str, Any], json: bool
) -> tuple[str, StreamedAnswer]:
    async with server.client() as client:
        model = server.model or first_model_of(await client.models())  # printed with --json
        asking = client.generate(prompt, model, stream=True, **options)
        return model, await print_stream(asking, silent=json)


def read_text(text: str, where: str) -> str:
    """`text`, or the contents of stdin if it is `-`. `where`: the option to name in errors.

    Raises Failure for an empty text and for text that is not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if text == "-" else text.encode()
        read = raw.decode()
    except UnicodeError as error:
        cause = f"the text is not UTF-8: {error}"
        raise Failure(cause, "convert it to UTF-8", "stdin" if text == "-" else where) from None
    if not read:
        raise Failure("the text is empty", "give some, or pipe it in and give -", where)
    return read


def terminal_text(text: str, stream: TextIO) -> str:
    """The text, on a terminal with its control characters spelt out.

    A model must not hide lines of the terminal, such as the call of a tool that the user allows.
    """
    if not stream.isatty():
        return text
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class ThoughtPrinter:
    """Shows the reasoning of a streamed answer on stderr, dimmed: stdout has the answer alone."""

    def __init__(self, *, is_silent: bool) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=is_silent)
        self._is_line_open = False

    def show(self, piece: Piece) -> None:
        """Show the reasoning in a piece. Call before the piece's text is printed."""
        if piece.reasoning:
            shown = terminal_text(piece.reasoning, sys.stderr)
            self._console.print(shown, style="dim", markup=False, end="")
            self._is_line_open = True
        elif self._is_line_open:
            self._console.print()
            self._is_line_open = False


async def print_stream(
    asking: Awaitable[AsyncReplyStream], *, silent: bool = False
) -> StreamedAnswer:
    """Print an answer while it streams, and return it. Raises ClientError.

    Ctrl-C cancels the request; the received part is returned. `silent` prints nothing.
    """
    answer, started_s = StreamedAnswer(), trio.current_time()
    thoughts = ThoughtPrinter(is_silent=silent)
    with trio.CancelScope() as scope:
        # Entered before the call is awaited: Ctrl-C must also cancel a call without an answer.
        async with drain_on_interrupt(scope, "\nstopped"), await asking as stream:
            async for piece in stream:
                answer.take(piece, trio.current_time() - started_s)
                thoughts.show(piece)
                if not silent:
                    print(terminal_text(piece, sys.stdout), end="", flush=True)
            answer.reply, answer.usage = stream.reply, stream.usage
    answer.is_stopped = scope.cancelled_caught
    if not silent and not (answer.calls_tools and not answer.text):
        print(flush=True)
    return answer


def show_stats(answer: StreamedAnswer) -> None:
    """Print one line to stderr: tokens, TTFT, TPOT, tokens a second."""
    parts = [f"{answer.num_tokens} tokens"]
    if answer.usage is not None and answer.usage.prompt_tokens is not None:
        parts.insert(0, f"prompt {answer.usage.prompt_tokens} tokens")
    if answer.ttft_s is not None:
        parts.append(f"TTFT {answer.ttft_s * 1e3:.1f} ms")
    if answer.tpot_s is not None:
        parts.append(f"TPOT {answer.tpot_s * 1e3:.1f} ms")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    print(", ".join(parts), file=sys.stderr)


def print_answer(answer: StreamedAnswer, model: str) -> None:
    """Print an answer and its figures to stdout as one JSON object."""
    thought = answer.reply.reasoning if answer.reply is not None else None
    timing = {name: getattr(answer, name) for name in ("ttft_s", "tpot_s", "tokens_per_s")}
    fields_of_answer: dict[str, Any] = {
        "model": model,
        "text": answer.text,
        **({"reasoning": thought} if thought else {}),
        "finish_reason": answer.finish_reason,
        "usage": answer.usage,
        "timing": timing,
    }
    print(msgspec.json.encode(fields_of_answer).decode())


@contextmanager
def translate_client_errors() -> Iterator[None]:
    """Turn a ClientError in the block into a Failure.

    Also unwraps an exception group: a nursery puts the ClientError of a task into one.
    """
    try:
        yield
    except ClientError as error:
        raise failure_of(error) from None
    except ExceptionGroup as group:
        found = group.subgroup(ClientError)
        if found is None:
            raise
        raise failure_of(_first(found)) from None


def _first(group: ExceptionGroup[ClientError]) -> ClientError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, ExceptionGroup) else inner


def failure_of(error: ClientError) -> Failure:
    """The Failure for an error. Exit code: 2 for a wrong call, 3 for a full server, else 1."""
    if error.status in REFUSALS:
        after = error.retry_after_s
        fix = "try again later" if after is None else f"try again in {after:g} s"
        return Failure(error.message, fix, code=RESOURCES)
    if error.status in (401, 403):
        return Failure(error.message, _KEY_FIX)
    is_mistake = error.status in _MISTAKES or error.code in (NOT_OFFERED, MISUSED)
    if is_mistake and (option := _option_of(error.param or "")):
        cause = error.message.removeprefix(f"{error.param}: ")
        return Failure(cause, "correct it, or leave it out", option)
    fix = _FIXES.get(error.code or "", "change the call" if is_mistake else "look at the server")
    return Failure(error.message, fix, error.param or "", CONFIGURATION if is_mistake else FAILED)


def _option_of(param: str) -> str | None:
    """The option that binds an answer by a field, or by a part of it; None for other fields."""
    found = (_OPTIONS_OF_FIELDS[name] for name in _OPTIONS_OF_FIELDS if param.startswith(name))
    return next(found, None)
