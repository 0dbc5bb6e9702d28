"""What one output line says: an answer with its usage and timing, or why there is none."""

from collections.abc import Sequence
from typing import Any

import msgspec

from sagellm.batch.line import Id
from sagellm.runtime.messages import SERVED, Answer, Stamps, TokenLogprob


def record(id: Id, answers: Sequence[Answer]) -> dict[str, Any]:
    """The output line of one request.

    With several choices, `choices` holds them all, and the top level repeats the first. A choice
    that was not served makes the whole line an error: half an answer is not one.
    """
    for answer in answers:
        if answer.finish_reason not in SERVED:
            return failure(id, answer.error or answer.finish_reason, answer.finish_reason)
    first = answers[0]
    line = {"id": id, **_choice(first), "usage": usage(answers), "timing": timing(first.stamps)}
    if len(answers) > 1:
        line["choices"] = [{"index": answer.choice, **_choice(answer)} for answer in answers]
    return line


def failure(id: Id, message: str, kind: str) -> dict[str, Any]:
    """The output line of a request without an answer; `kind` is a finish reason or "malformed"."""
    return {"id": id, "error": {"message": message, "type": kind}}


def encode(line: dict[str, Any]) -> bytes:
    """One line of JSON, newline included; a user's value that is not JSON is written as text."""
    return msgspec.json.encode(line, enc_hook=str) + b"\n"


def _choice(answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.stop_reason is not None:
        said["stop_reason"] = answer.stop_reason
    if answer.logprobs:
        said["logprobs"] = [_logprob(logprob) for logprob in answer.logprobs]
    if answer.value is not None:
        said["value"] = answer.value
    return said


def _logprob(logprob: TokenLogprob) -> dict[str, Any]:
    return {"token_id": logprob.token_id, "logprob": logprob.logprob, "top": logprob.top}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Token counts under the OpenAI names; the prompt counts once, however many the choices."""
    num_prompt = answers[0].num_prompt_tokens
    num_completion = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def timing(stamps: Stamps) -> dict[str, float | None]:
    """Milliseconds of each phase, None for one that was not passed; they add up to the whole."""
    bounds = (
        ("queue_ms", stamps.dispatched_s if stamps.started_s is None else stamps.started_s),
        ("prefill_ms", stamps.prefilled_s),
        ("transfer_ms", stamps.transferred_s),
        ("decode_ms", stamps.finished_s),
    )
    phases: dict[str, float | None] = {}
    begun = stamps.arrived_s
    for name, ended in bounds:
        phases[name] = None if ended is None else round((ended - begun) * 1e3, 3)
        begun = begun if ended is None else ended
    return phases
