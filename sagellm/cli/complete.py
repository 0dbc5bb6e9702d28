"""Commands that talk to a server: which one, what its errors mean, and `sagellm complete`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any

import trio
from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.errors import CONFIGURATION, FAILED, INTERRUPTED, RESOURCES, Failure
from sagellm.cli.terminal import StreamedAnswer, print_answer, print_stream, show_stats
from sagellm.client.http_calls import KEY_VARIABLE, first_model_of
from sagellm.client.responses import NOT_OFFERED, TIMED_OUT, UNREACHABLE, ClientError
from sagellm.client.unified_async import AsyncUnifiedInferenceClient
from sagellm.load import REFUSALS

_KEY_FIX = f"give --api-key, or set {KEY_VARIABLE}"
_FIXES = {
    UNREACHABLE: "start one with `sagellm serve`, or give --url",
    TIMED_OUT: "look at the server, or raise --timeout",
    NOT_OFFERED: "change the command, or choose another server",
}
_MISTAKES = (400, 401, 403, 404, 405, 413, 422)


@Parameter(name="*", group="Server")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Any OpenAI-compatible server."""

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
    """What is not given, the server decides."""

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
        """The options that the user chose."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


@contextmanager
def translate_client_errors() -> Iterator[None]:
    """Raise Failure for what a server refuses or fails, in a nursery or not."""
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
    """Cause, way out and exit code: 2 for a call that is wrong, 3 for a server that is full."""
    if error.status in REFUSALS:
        after = error.retry_after_s
        fix = "try again later" if after is None else f"try again in {after:g} s"
        return Failure(error.message, fix, code=RESOURCES)
    if error.status in (401, 403):
        return Failure(error.message, _KEY_FIX)
    is_mistake = error.status in _MISTAKES or error.code == NOT_OFFERED
    fix = _FIXES.get(error.code or "", "change the call" if is_mistake else "look at the server")
    return Failure(error.message, fix, error.param or "", CONFIGURATION if is_mistake else FAILED)


def complete(
    text: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    server: ServerOptions = ServerOptions(),
    draw: RequestSamplingOptions = RequestSamplingOptions(),
    stats: bool = False,
    json: bool = False,
) -> int:
    """Print what a model writes behind a text, while it comes; Ctrl-C stops it.

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
    with translate_client_errors():
        model, told = trio.run(_complete, prompt, server, draw, stats, json)
    if json and not told.is_stopped:
        print_answer(told, model)
    if stats:
        show_stats(told)
    return INTERRUPTED if told.is_stopped else 0


async def _complete(
    prompt: str, server: ServerOptions, draw: RequestSamplingOptions, stats: bool, json: bool
) -> tuple[str, StreamedAnswer]:
    options = {**draw.given}
    if stats or json:
        options["stream_options"] = {"include_usage": True}
    async with server.client() as client:
        model = server.model or first_model_of(await client.models())
        asking = client.generate(prompt, model, stream=True, **options)
        return model, await print_stream(asking, silent=json)


def read_text(text: str, where: str) -> str:
    """The text itself, or stdin for `-`. Raises Failure where there is none, or no UTF-8."""
    try:
        raw = sys.stdin.buffer.read() if text == "-" else text.encode()
        read = raw.decode()
    except UnicodeError as error:
        cause = f"the text is not UTF-8: {error}"
        raise Failure(cause, "convert it to UTF-8", "stdin" if text == "-" else where) from None
    if not read:
        raise Failure("the text is empty", "give some, or pipe it in and give -", where)
    return read
