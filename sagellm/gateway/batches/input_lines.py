"""The input of a batch: lines {custom_id, method, url, body}, checked and found by their place.

Only the frame of a line is checked here. The endpoint reads the body, as it reads that of a call.
`sagellm run --input` reads such lines too, for a session: it maps each body to the fields of
`Sampling`, and reads from pipes.
"""

import re
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from sagellm.gateway.answers.stored_objects import InputError
from sagellm.gateway.protocol.json import shown
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.messages import PRIORITIES

MAX_CUSTOM_ID_LEN = 512
MAX_ERRORS = 100  # the most mistakes that a batch reports
_FRAME_BYTES = 8 << 10  # of a line besides its body
_LINES_PER_REQUEST = 4  # lines of a file, blank ones too, by the requests that it may have
_TEXT_BYTES = 8 * MAX_CUSTOM_ID_LEN  # of a text in a frame, with escapes
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
_BACKGROUND = PRIORITIES["background"]


_NULL = msgspec.Raw(b"null")


# All fields stay JSON text: values of millions of parts would hold the interpreter for long.
class InputFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of one line, before they are checked."""

    custom_id: msgspec.Raw = _NULL
    method: msgspec.Raw = msgspec.Raw(b'"POST"')
    url: msgspec.Raw = _NULL
    body: msgspec.Raw = _NULL


class BodyFields(msgspec.Struct, frozen=True):
    """The fields of a body that a batch restricts."""

    stream: msgspec.Raw = _NULL
    priority: msgspec.Raw = _NULL
    slo_ttft_s: msgspec.Raw = _NULL
    no_queue: msgspec.Raw = _NULL


@dataclass(frozen=True, slots=True)
class InputLine:
    """One valid line. `body`: the JSON text of its body."""

    custom_id: str
    body: bytes


@dataclass(slots=True)
class InputScan:
    """The result of a scan of the input. `pending`: the offsets of the lines without a result.

    `total` counts valid lines. If there are `errors`, the other fields are not complete.
    """

    pending: "array[int]" = field(default_factory=lambda: array("Q"))
    total: int = 0
    errors: list[InputError] = field(default_factory=list)


class _WrongLine(Exception):
    """A wrong line. `is_last`: no further line is read."""

    def __init__(
        self, code: str, message: str, param: str | None = None, *, is_last: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.is_last = is_last

    def input_error(self, line: int | None = None) -> InputError:
        return InputError(code=self.code, message=self.message, line=line, param=self.param)


def scan_input(
    path: Path,
    endpoint: str,
    *,
    max_lines: int,
    max_body_bytes: int,
    done: Container[str] = frozenset(),
) -> InputScan:
    """Check all lines. `done`: the custom ids that have a result. Blocks for a large file."""
    scan, seen = InputScan(), set[str]()
    with path.open("rb") as file:
        for number, offset, raw in _lines(file, max_body_bytes + _FRAME_BYTES):
            try:
                is_blank = not raw.strip()
                _check_number(number, len(seen) + (not is_blank), max_lines)
                if is_blank:
                    continue
                name = _checked(raw, endpoint, max_body_bytes).custom_id
                if name in seen:
                    raise _WrongLine("duplicate_custom_id", "an earlier line has this custom_id")
            except _WrongLine as error:
                scan.errors.append(error.input_error(number))
                if len(scan.errors) >= MAX_ERRORS or error.is_last:
                    return scan
            else:
                seen.add(name)
                if name not in done:
                    scan.pending.append(offset)
    scan.total = len(seen)
    if not seen and not scan.errors:
        scan.errors.append(_WrongLine("empty_file", "the file has no requests").input_error())
    return scan


def _check_number(number: int, num_requests: int, max_lines: int) -> None:
    """Raise _WrongLine for one request too many, or for too many lines. `number`: of the line.

    Blank lines are bounded, because they take time too.
    """
    if num_requests > max_lines or number > _LINES_PER_REQUEST * max_lines:
        message = f"the file has more than {max_lines} requests, or too many blank lines"
        raise _WrongLine("too_many_requests", message, is_last=True)


def read_input(path: Path, offset: int) -> InputLine:
    """Read one line that `scan_input` has found valid."""
    with path.open("rb") as file:
        file.seek(offset)
        fields = _decoded(file.readline())
    return InputLine(_custom_id(fields), bytes(fields.body))


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, offset, line) for each line. Numbers begin at 1.

    A line that is too long is cut to `max_bytes` + 1 bytes.
    """
    file.seek(0)
    number = offset = 0
    while raw := file.readline(max_bytes + 1):
        number += 1
        size = len(raw)
        while len(raw) > max_bytes and (rest := file.readline(1 << 20)):
            size += len(rest)  # skip the rest of a line that is too long
            if rest.endswith(b"\n"):
                break
        yield number, offset, raw
        offset += size


def _checked(raw: bytes, endpoint: str, max_body_bytes: int) -> InputLine:
    """Return a valid line. Raises _WrongLine, whose message contains nothing of the line."""
    if len(raw) > max_body_bytes + _FRAME_BYTES:
        raise _WrongLine("line_too_long", f"the line is longer than {max_body_bytes} bytes")
    fields = _decoded(raw)
    name = _custom_id(fields)
    if _text(fields.method) != "POST":
        raise _WrongLine("invalid_method", "method must be POST", "method")
    if _text(fields.url) != endpoint:
        raise _WrongLine("invalid_url", f"url must be {endpoint}, the batch's endpoint", "url")
    body = bytes(fields.body)
    _check_body(body, max_body_bytes)
    return InputLine(name, body)


def _decoded(raw: bytes) -> InputFields:
    try:
        return msgspec.json.decode(raw, type=InputFields)
    except (ValueError, RecursionError) as error:  # deep nesting raises RecursionError
        unknown = _UNKNOWN.search(str(error))
    if unknown is None:
        raise _WrongLine("invalid_json_line", "the line is no JSON object")
    name = unknown[1]
    close = nearest(name, InputFields.__struct_fields__) if len(name) <= 64 else None
    hint = f"; did you mean `{close}`?" if close else ""
    raise _WrongLine("unknown_parameter", f"unknown field {shown(name)}{hint}")


def _text(raw: msgspec.Raw) -> str | None:
    """Return a short JSON text; None for any other value."""
    try:
        return msgspec.json.decode(raw, type=str) if len(bytes(raw)) <= _TEXT_BYTES else None
    except ValueError:
        return None


def _custom_id(fields: InputFields) -> str:
    name = _text(fields.custom_id)
    if name is None or not 0 < len(name) <= MAX_CUSTOM_ID_LEN:
        message = f"custom_id must be a text of 1 to {MAX_CUSTOM_ID_LEN} characters"
        raise _WrongLine("invalid_custom_id", message, "custom_id")
    return name


def _check_body(body: bytes, max_bytes: int) -> None:
    """Check the fields that a batch restricts. The endpoint checks all others."""
    if len(body) > max_bytes:
        raise _WrongLine("body_too_large", f"body is larger than {max_bytes} bytes", "body")
    try:
        fields = msgspec.json.decode(body, type=BodyFields)
    except (ValueError, RecursionError):
        raise _WrongLine("invalid_body", "body must be a JSON object", "body") from None
    if bytes(fields.stream) not in (b"null", b"false"):
        raise _WrongLine("invalid_body", "an answer of a batch is not streamed", "body.stream")
    if bytes(fields.priority) not in (b"null", b"%d" % _BACKGROUND):
        message = f"a batch runs at priority {_BACKGROUND} (background); leave priority out"
        raise _WrongLine("invalid_body", message, "body.priority")
    if bytes(fields.slo_ttft_s) != b"null":
        message = "a batch has no objective for first tokens; leave slo_ttft_s out"
        raise _WrongLine("invalid_body", message, "body.slo_ttft_s")
    if bytes(fields.no_queue) not in (b"null", b"false"):
        message = "the requests of a batch wait for their turn; leave no_queue out"
        raise _WrongLine("invalid_body", message, "body.no_queue")
