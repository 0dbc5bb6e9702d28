"""Answers a file of prompts: reads JSON lines, writes JSON lines, and can resume a run."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import msgspec
import trio

from sagellm.batch.prompt_lines import LineError, LineId, LineRequest, parse_line
from sagellm.errors import naming_file
from sagellm.runtime.messages import SERVED, Answer, Stamps, TokenLogprob
from sagellm.runtime.sampling import Sampling
from sagellm.session.requests import RequestFailed, RequestRefused


def answer_record(id: LineId, answers: Sequence[Answer]) -> dict[str, Any]:
    """The output line of one request.

    For several choices, `choices` has all of them, and the top level repeats the first choice. The
    line is an error if any choice has a finish reason outside SERVED.
    """
    for answer in answers:
        if answer.finish_reason not in SERVED:
            return error_record(id, answer.error or answer.finish_reason, answer.finish_reason)
    first = answers[0]
    line = {
        "id": id,
        **_choice(first),
        "usage": token_usage(answers),
        "timing": phase_times(first.stamps),
    }
    if len(answers) > 1:
        line["choices"] = [{"index": answer.choice, **_choice(answer)} for answer in answers]
    return line


def error_record(id: LineId, message: str, kind: str) -> dict[str, Any]:
    """The output line of a failed request. `kind`: a finish reason, or "malformed"."""
    return {"id": id, "error": {"message": message, "type": kind}}


def encode_record(line: dict[str, Any]) -> bytes:
    """Encode a line as JSON with a newline. Values that JSON cannot hold are converted by `str`."""
    return msgspec.json.encode(line, enc_hook=str) + b"\n"


def _choice(answer: Answer) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
    }
    if answer.stop_reason is not None:
        fields["stop_reason"] = answer.stop_reason
    if answer.logprobs:
        fields["logprobs"] = [_logprob(logprob) for logprob in answer.logprobs]
    if answer.value is not None:
        fields["value"] = answer.value
    return fields


def _logprob(logprob: TokenLogprob) -> dict[str, Any]:
    return {"token_id": logprob.token_id, "logprob": logprob.logprob, "top": logprob.top}


def token_usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Token counts under the names of the OpenAI API. The shared prompt counts once."""
    num_prompt = answers[0].num_prompt_tokens
    num_completion = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def phase_times(stamps: Stamps) -> dict[str, float | None]:
    """The duration of each phase in ms; None for a phase that did not happen.

    The durations add up to the time between arrival and finish.
    """
    bounds = (
        # Remote engines do not report their first step: their queue phase ends at dispatch.
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


class OutputFile:
    """A file of output lines. Each line is flushed at once, so that a kill loses no complete line.

    `answered`: the ids, as text, that the file contained when it was opened. Leaving the `with`
    block closes the file.
    """

    def __init__(self, file: BinaryIO, path: Path, answered: frozenset[str] = frozenset()) -> None:
        self.answered = answered
        self._file = file
        self._path = path

    def write(self, line: dict[str, Any]) -> None:
        with naming_file(self._path):
            self._file.write(encode_record(line))
            self._file.flush()

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming_file(self._path):
            self._file.close()


def open_output(path: Path, *, force: bool = False, resume: bool = False) -> OutputFile:
    """Open `path` for output lines.

    `force` replaces an existing file. `resume` keeps its complete lines with answers, and drops
    errors and an incomplete last line: their requests run again. Without either, an existing file
    raises FileExistsError.
    """
    if resume and path.exists():
        answered = _keep_answers(path)
        return OutputFile(path.open("ab"), path, answered)
    return OutputFile(path.open("wb" if force else "xb"), path)


def _keep_answers(path: Path) -> frozenset[str]:
    """Remove all lines but the answers from the file, and return the answers' ids.

    The answers are copied to a new file, which then replaces the old one atomically: a kill at any
    time loses no answer.
    """
    answered = set()
    kept = path.with_name(path.name + ".resuming")
    with naming_file(kept), path.open("rb") as old, kept.open("wb") as new:
        for raw, id in _answers(old):
            new.write(raw)
            answered.add(id)
        new.flush()
        os.fsync(new.fileno())  # the data must reach the disk before the rename does
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


# Enough to fill the batches of several small engines; more requests would wait in policy_sort.
NUM_IN_FLIGHT = 64

AnswerLine: TypeAlias = Callable[[LineRequest], Awaitable[Sequence[Answer]]]


@dataclass
class LineCounts:
    """Counts of lines. `ids`: id, as text, -> line number; used to refuse a repeated id."""

    num_answered: int = 0
    num_failed: int = 0
    num_skipped: int = 0  # answered by an earlier run
    ids: dict[str, int] = field(default_factory=dict)

    @property
    def num_done(self) -> int:
        return self.num_answered + self.num_failed + self.num_skipped


@dataclass(frozen=True)
class BatchRun:
    """One run over the lines of an input.

    `reply` answers a line. `defaults`: the sampling parameters for lines that set none; `given`:
    the names of the defaults that the user chose (see `parse_line`). `report` is called with each
    output line after the line was written, and with None for each skipped line.
    """

    reply: AnswerLine
    output: OutputFile
    defaults: Sampling = field(default_factory=Sampling)
    given: frozenset[str] = frozenset()
    report: Callable[[dict[str, Any] | None], None] = lambda line: None
    num_in_flight: int = NUM_IN_FLIGHT
    counts: LineCounts = field(default_factory=LineCounts)

    async def serve(
        self, lines: AsyncIterator[tuple[int, bytes]], drain: trio.CancelScope | None = None
    ) -> LineCounts:
        """Answer every line. Output lines are written in order of completion.

        Cancelling `drain` stops reading; requests in flight still finish.
        """
        slots = trio.Semaphore(self.num_in_flight)
        async with trio.open_nursery() as nursery:
            with drain or trio.CancelScope():
                async with aclosing(lines) as reading:  # type: ignore[type-var]
                    async for number, raw in reading:
                        await slots.acquire()
                        self._start(nursery, slots, number, raw)
        return self.counts

    def _start(self, nursery: trio.Nursery, slots: trio.Semaphore, number: int, raw: bytes) -> None:
        """Start the request of one line. The slot is released once the output line is written."""
        try:
            ask = self._claimed(parse_line(number, raw, self.defaults, self.given))
        except LineError as error:
            self._write(error_record(error.id, str(error), "malformed"))
            slots.release()
            return
        if str(ask.id) in self.output.answered:
            self.counts.num_skipped += 1
            self.report(None)
            slots.release()
            return
        nursery.start_soon(self._answer, ask, slots)

    def _claimed(self, ask: LineRequest) -> LineRequest:
        # Compare as text: a resumed run does not distinguish the ids 1 and "1".
        first = self.counts.ids.setdefault(str(ask.id), ask.number)
        if first != ask.number:
            raise LineError(ask.number, f"id {ask.id!r} is that of line {first}", ask.id)
        return ask

    async def _answer(self, ask: LineRequest, slots: trio.Semaphore) -> None:
        try:
            line = answer_record(ask.id, await self.reply(ask))
        except (RequestRefused, RequestFailed) as error:
            line = error_record(ask.id, str(error), str(error.end.finish_reason))
        except ValueError as error:  # the session refused it before it entered the graph
            line = error_record(ask.id, f"line {ask.number}: {error}", "refused")
        self._write(line)
        slots.release()

    def _write(self, line: dict[str, Any]) -> None:
        self.output.write(line)
        failed = "error" in line
        self.counts.num_failed += failed
        self.counts.num_answered += not failed
        self.report(line)
