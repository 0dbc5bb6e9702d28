"""The results of a batch: lines that are appended durably, read again, and become files."""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from sagellm.gateway.answers.event_stream import escaped
from sagellm.gateway.batches.batch_record import BatchTokens
from sagellm.gateway.batches.batch_store import BatchClaim
from sagellm.gateway.batches.data_folder import open_private, sync_folder
from sagellm.gateway.batches.file_store import FileRecord, content_path, save_record
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")


class LineResponse(msgspec.Struct, frozen=True):
    """The answer to one request, as a client of HTTP would have got it. `body` is JSON text."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineFailure(msgspec.Struct, frozen=True):
    """The reason why a request got no answer."""

    code: str
    message: str


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a result file, in the form of the OpenAI API."""

    id: str
    custom_id: str
    response: LineResponse | None = None
    error: LineFailure | None = None

    @property
    def is_answer(self) -> bool:
        return self.response is not None and self.response.status_code == 200

    @property
    def encoded(self) -> bytes:
        # Escaped, because many clients split a text at every Unicode line end.
        return escaped(msgspec.json.encode(self)) + b"\n"


class _TokenDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _AnyUsage(msgspec.Struct, frozen=True):
    """The usage of an answer, under the names of chats and completions, or of /v1/responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _TokenDetails | None = None
    completion_tokens_details: _TokenDetails | None = None
    input_tokens_details: _TokenDetails | None = None
    output_tokens_details: _TokenDetails | None = None


_NO_USAGE = _AnyUsage()


class _AnyBody(msgspec.Struct, frozen=True):
    usage: _AnyUsage | None = None


class _AnyResponse(msgspec.Struct, frozen=True):
    body: _AnyBody = _AnyBody()


class _Stored(msgspec.Struct, frozen=True):
    """The part of a stored line that is read again. `response` stays JSON text."""

    custom_id: str
    response: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def usage(self) -> _AnyUsage | None:
        """The tokens of the answer; None if it has none, or says them in another way."""
        try:
            found = msgspec.json.decode(self.response, type=_AnyResponse | None)
        except ValueError:
            return None
        return None if found is None else found.body.usage


@dataclass(slots=True)
class Tally:
    """The contents of the result files, in numbers. `done`: the custom ids of all lines."""

    completed: int = 0
    failed: int = 0
    tokens: BatchTokens = field(default_factory=BatchTokens)
    done: set[str] = field(default_factory=set)


class ResultFiles:
    """The two files of results of a batch that has not ended. All methods block."""

    def __init__(self, claim: BatchClaim) -> None:
        self._paths = claim.path("output"), claim.path("errors")
        self._files: list[IO[bytes]] = []
        self.completed = self.failed = 0

    def open(self) -> Tally:
        """Open the files for appending. Return what earlier processes have written.

        A last line that is torn is cut off: its request has no result yet.
        """
        tally = Tally()
        for path in self._paths:
            self._files.append(open_private(path, "ab", buffering=0))
        tally.completed, tally.failed = (
            _tally(path, file, tally) for path, file in zip(self._paths, self._files, strict=True)
        )
        self.completed, self.failed = tally.completed, tally.failed
        return tally

    def append(self, lines: Sequence[ResultLine]) -> None:
        """Append lines. They are on the disk after the return.

        Raises OSError. Then the answers may have been appended, and the failures have not: `open`
        tells which lines there are.
        """
        output, errors = self._files
        answers = [line.encoded for line in lines if line.is_answer]
        failures = [line.encoded for line in lines if not line.is_answer]
        _append(output, answers)
        self.completed += len(answers)
        _append(errors, failures)
        self.failed += len(failures)

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def _append(file: IO[bytes], lines: Sequence[bytes]) -> None:
    if not lines:
        return
    end = file.seek(0, os.SEEK_END)
    try:
        unwritten = memoryview(b"".join(lines))
        while unwritten:
            unwritten = unwritten[file.write(unwritten) :]
        os.fdatasync(file.fileno()) if hasattr(os, "fdatasync") else os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)  # half a line would end the file for later lines
        raise


def _tally(path: Path, file: IO[bytes], tally: Tally) -> int:
    """Add the lines of a file to a tally, and cut the file after its last valid line."""
    num_lines = end = 0
    with path.open("rb") as reading:
        while (raw := reading.readline()).endswith(b"\n") and (line := _stored(raw)) is not None:
            num_lines, end = num_lines + 1, end + len(raw)
            tally.done.add(line.custom_id)
            tally.tokens = _added(tally.tokens, line.usage or _NO_USAGE)
    if end < path.stat().st_size:
        LOG.info("batch_line_torn", num_bytes=path.stat().st_size - end)
        file.truncate(end)
    return num_lines


def _stored(raw: bytes) -> _Stored | None:
    try:
        return msgspec.json.decode(raw, type=_Stored)
    except ValueError:
        return None


def _added(tokens: BatchTokens, usage: _AnyUsage) -> BatchTokens:
    given = usage.prompt_tokens_details or usage.input_tokens_details or _TokenDetails()
    made = usage.completion_tokens_details or usage.output_tokens_details or _TokenDetails()
    return BatchTokens(
        input=tokens.input + usage.prompt_tokens + usage.input_tokens,
        cached=tokens.cached + (given.cached_tokens or 0),
        output=tokens.output + usage.completion_tokens + usage.output_tokens,
        reasoning=tokens.reasoning + (made.reasoning_tokens or 0),
    )


def publish(claim: BatchClaim) -> None:
    """Make files of the results, which the tenant can read. May be repeated after a crash.

    A result file without lines is left out.
    """
    record = claim.record
    for part, file_id in (("output", record.output_id), ("errors", record.error_id)):
        source, target = claim.path(part), content_path(claim.own, file_id)
        if source.exists() and source.stat().st_size:
            # The record first: a sweep deletes old content that has none.
            save_record(claim.own, _file_record(claim, file_id, part, source))
            source.replace(target)
    sync_folder(claim.own.files)  # before the record of the batch names them


def published(claim: BatchClaim) -> tuple[bool, bool]:
    """Return whether there is a file of answers, and one of failed requests."""
    record = claim.record
    output, errors = (content_path(claim.own, one) for one in (record.output_id, record.error_id))
    return output.exists(), errors.exists()


def _file_record(claim: BatchClaim, file_id: str, part: str, path: Path) -> FileRecord:
    record, created_s = claim.record, int(time.time())
    life_s = record.output_life_s
    return FileRecord(
        id=file_id,
        tenant=record.tenant,
        bytes=path.stat().st_size,
        created_at=created_s,
        filename=f"{record.id}_{part}.jsonl",
        purpose="batch_output",
        expires_at=None if life_s is None else created_s + life_s,
    )


def unanswered(code: str, message: str, custom_ids: Iterable[str]) -> list[ResultLine]:
    """Return the result lines of requests that got no answer."""
    failure = LineFailure(code, message)
    return [
        ResultLine(id=f"batch_req_{os.urandom(16).hex()}", custom_id=custom_id, error=failure)
        for custom_id in custom_ids
    ]
