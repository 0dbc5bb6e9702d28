"""One prompt through a graph."""

import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from sagellm.batch import answer_record, encode_record, error_record
from sagellm.batch.prompt_lines import LinePrompt
from sagellm.cli.errors import CONFIGURATION, FAILED, INTERRUPTED, Failure, drain_on_interrupt
from sagellm.cli.run_options import PromptOptions, RunSamplingOptions
from sagellm.cli.terminal import show_summary
from sagellm.runtime.messages import SERVED, Answer, Sampling
from sagellm.runtime.models.chat import ChatTemplateError
from sagellm.session import Output, RequestError, RequestFailed, RequestRefused, Session
from sagellm.session.requests import Encoded, check_room

PROMPT_ID = "prompt"
_FIX_OF_FAULT = "correct what is named there; the log on stderr has the traceback of your own code"

T = TypeVar("T")


async def answer_prompt(
    opening: AbstractAsyncContextManager[Session],
    asked: PromptOptions,
    draw: RunSamplingOptions,
    json: bool,
    model: str = "",
) -> int:
    """Print the answer to stdout and a summary to stderr; returns the exit code."""
    prompt = _prompt(asked)
    answer = _streamed if asked.stream else _whole
    async with opening as session:
        with trio.CancelScope() as asking:
            async with drain_on_interrupt(asking, "cancelled"):
                end = await _accepted(_asked(answer, session, prompt, draw, json, model))
        if asking.cancelled_caught:
            return INTERRUPTED
        show_summary(session.statistics())
    _check_served(end)
    return 0


def _prompt(asked: PromptOptions) -> LinePrompt:
    text = _text(asked.prompt)
    if not text:
        raise Failure("the prompt is empty", 'give --prompt "Hello", or pipe text into --prompt -')
    return [{"role": "user", "content": text}] if asked.chat else text


def _text(prompt: str | None) -> str:
    """The prompt itself, or stdin for `-`. Bytes of a command line that are no UTF-8 are lone
    surrogates here, which no tokenizer takes."""
    try:
        raw = sys.stdin.buffer.read() if prompt == "-" else (prompt or "").encode()
        return raw.decode()
    except UnicodeError as error:
        where = "stdin" if prompt == "-" else "--prompt"
        raise Failure(f"the prompt is not UTF-8: {error}", "convert it to UTF-8", where) from None


async def _accepted(answering: Awaitable[T]) -> T:
    """Raises Failure where the request is wrong, refused by the graph, or fails in it."""
    try:
        return await answering
    except RequestFailed as error:
        raise Failure(str(error), _FIX_OF_FAULT, code=FAILED) from None
    except RequestRefused as error:
        raise Failure(str(error), "change the prompt, its options or the graph") from None
    except (RequestError, ChatTemplateError) as error:
        raise Failure(str(error), "change the prompt or its options") from None


async def _asked(
    answer: Callable[..., Awaitable[T]],
    session: Session,
    prompt: LinePrompt,
    draw: RunSamplingOptions,
    json: bool,
    model: str,
) -> T:
    """Raises RequestError where an answer as long as was asked for does not fit the context."""
    encoded = session.encode(prompt, model=model)
    if draw.max_tokens is not None:
        check_room(len(encoded.token_ids), draw.max_tokens, session.max_model_len_of(model))
    return await answer(session, encoded, draw.sampling, json, model)


async def _whole(
    session: Session, prompt: Encoded, sampling: Sampling, json: bool, model: str
) -> Answer:
    try:
        answer = await session.generate(prompt, sampling=sampling, model=model)
    except (RequestRefused, RequestFailed) as error:
        if json:
            line = error_record(PROMPT_ID, str(error), str(error.end.finish_reason))
            _write(encode_record(line).decode())
        raise
    if json:
        _write(encode_record(answer_record(PROMPT_ID, [answer])).decode())
    elif answer.finish_reason in SERVED:
        _write(f"{answer.text if answer.value is None else answer.value}\n")
    return answer


async def _streamed(
    session: Session, prompt: Encoded, sampling: Sampling, json: bool, model: str
) -> Output | None:
    """Print text, or one JSON line an event, while it comes; returns the last event."""
    event: Output | None = None
    async with session.stream(prompt, sampling=sampling, model=model) as stream:
        try:
            async for event in stream:
                _write(encode_record(_event(event)).decode() if json else event.text)
        except (RequestRefused, RequestFailed) as error:
            _write(encode_record(_event(error.end)).decode() if json else "\n")
            raise
    _write("" if json else "\n")
    return event


def _event(event: Output) -> dict[str, object]:
    named = ("text", "token_ids", "finish_reason", "error")
    return {"id": PROMPT_ID, **{name: getattr(event, name) for name in named}}


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _check_served(end: Output | None) -> None:
    """Raise Failure if the last word on the request is not an answer."""
    reason = end.finish_reason if end else "filtered"
    if reason in SERVED:
        return
    cause = (end and end.error) or f"the graph ended the request: {reason}"
    code = CONFIGURATION if reason == "refused" else FAILED
    raise Failure(cause, "change the prompt, its options or the graph", code=code)
