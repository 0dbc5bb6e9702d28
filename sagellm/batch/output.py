"""The output file: one record a line, never overwritten unasked, resumable after a kill."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from sagellm.batch.line import Id
from sagellm.naming import naming
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


class Output:
    """Lines appended to a file, each flushed before the next. `answered` holds the ids it began
    with, as text. Used as a context: the file is closed at the end."""

    def __init__(self, file: BinaryIO, path: Path, answered: frozenset[str] = frozenset()) -> None:
        self.answered = answered
        self._file = file
        self._path = path

    def write(self, line: dict[str, Any]) -> None:
        with naming(self._path):
            self._file.write(encode(line))
            self._file.flush()

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self._path):
            self._file.close()


def open_output(path: Path, *, force: bool = False, resume: bool = False) -> Output:
    """Open `path` for answers. Raises FileExistsError unless it is new, forced or resumed.

    Resuming keeps the whole lines that hold an answer, and drops errors and a torn last line:
    those are asked again.
    """
    if resume and path.exists():
        answered = _keep_answers(path)
        return Output(path.open("ab"), path, answered)
    return Output(path.open("wb" if force else "xb"), path)


def _keep_answers(path: Path) -> frozenset[str]:
    """Rewrite the file with its answers only, in one step; returns their ids."""
    answered = set()
    kept = path.with_name(path.name + ".resuming")
    with naming(kept), path.open("rb") as old, kept.open("wb") as new:
        for raw, id in _answers(old):
            new.write(raw)
            answered.add(id)
        new.flush()
        os.fsync(new.fileno())
    kept.replace(path)
    return frozenset(answered)


def _answers(lines: BinaryIO) -> Iterator[tuple[bytes, str]]:
    for raw in lines:
        try:
            line = msgspec.json.decode(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and isinstance(line, dict) and "text" in line and "id" in line:
            yield raw, str(line["id"])
