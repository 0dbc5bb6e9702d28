"""Reads the multipart body of an upload: the file goes to the disk piece by piece."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.batches.data_folder import DataFolder
from sagellm.gateway.batches.file_store import DEFAULT_LIFE_S, Upload
from sagellm.gateway.protocol.batch_bodies import LIFE_S
from sagellm.gateway.protocol.json import shown
from sagellm.graphs.vocabulary import nearest

MAX_FIELD_BYTES = 512
MAX_FILENAME_LEN = 255
_PIECE_BYTES = 1 << 20  # of the body, in memory for each upload
_PURPOSE, _ANCHOR, _SECONDS = "purpose", "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = (_PURPOSE, _ANCHOR, _SECONDS)
_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")  # of a part; others were never sent by browsers


class UploadFields(NamedTuple):
    """The checked fields of an upload. `life_s`: seconds from its creation to its expiry."""

    filename: str
    life_s: int


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a multipart body. Raises ApiError (400) for another content type."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise wrong("content-type", "must be multipart/form-data, with a boundary")
    return boundary


class UploadForm:
    """Takes the bytes of one body. `feed` and `finish` block, so they run in a thread.

    The parser bounds the headers of a part: eight, of 4 KiB each. Each field may come once, so
    there are at most as many parts as fields.
    """

    def __init__(self, boundary: bytes, upload: Upload, max_bytes: int) -> None:
        self._upload = upload
        self._max_bytes = max_bytes
        self._values: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._name = ""  # of the current part
        self._is_whole = False
        self._header = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        try:
            self._parser = MultipartParser(boundary, self._callbacks)
        except FormParserError:
            fault = "the boundary is too long"
        else:
            return
        raise wrong("content-type", fault)

    @property
    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take,
            "on_end": self._end,
        }

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body. Raises ApiError for a wrong body, or a full disk."""
        try:
            self._parser.write(data)
        except FormParserError:
            fault = "the body is not valid multipart/form-data"
        else:
            return
        raise ApiError(400, fault)

    def finish(self) -> UploadFields:
        """Check the fields after the last byte. Raises ApiError (400)."""
        if not self._is_whole:
            raise ApiError(400, "the body ends before the last boundary of multipart/form-data")
        if self._filename is None:
            raise wrong("file", "is missing", "missing_required_parameter")
        if not self._upload.num_bytes:
            raise wrong("file", "is empty")
        _check_purpose(self._text(_PURPOSE))
        return UploadFields(self._filename, _life_s(self._text(_ANCHOR), self._text(_SECONDS)))

    def _text(self, name: str) -> str | None:
        value = self._values.get(name)
        return None if value is None else value.decode(errors="replace")

    # ---- called by the parser ----------------------------------------------------------------

    def _begin_part(self) -> None:
        self._headers.clear()

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = bytearray(), bytearray()

    def _end_headers(self) -> None:
        """Find out which field the current part is. Raises ApiError (400) for an unknown field."""
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _ENCODINGS:
            raise ApiError(400, "a part is encoded; send it as it is")
        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        _, options = parse_options_header(disposition)
        name = self._name = options.get(b"name", b"").decode(errors="replace")
        if name == "file" and self._filename is None:
            self._filename = _filename(options.get(b"filename", b""))
        elif name in _FIELDS and name not in self._values:
            self._values[name] = bytearray()
        elif name == "file" or name in _FIELDS:
            raise wrong(name, "is given twice")
        else:
            raise _unknown(name)

    def _take(self, data: bytes, start: int, end: int) -> None:
        """Take a piece of the current part."""
        if self._name == "file":
            if self._upload.num_bytes + end - start > self._max_bytes:
                raise ApiError(413, f"the file is larger than {self._max_bytes} bytes")
            self._upload.write(memoryview(data)[start:end])
            return
        value = self._values[self._name]
        if len(value) + end - start > MAX_FIELD_BYTES:
            raise wrong(self._name, f"is longer than {MAX_FIELD_BYTES} bytes")
        value += data[start:end]

    def _end(self) -> None:
        self._is_whole = True


def _unknown(name: str) -> ApiError:
    close = nearest(name, ("file", *_FIELDS)) if len(name) <= 64 else None
    hint = f"; did you mean `{close}`?" if close else ""
    return ApiError(400, f"unknown field {shown(name)}{hint}", code="unknown_parameter")


def _filename(given: bytes) -> str:
    """Return the last part of a client's file name. It is shown to the client, and never a path."""
    try:
        name = given.decode().replace("\\", "/").rpartition("/")[2]
    except UnicodeDecodeError:
        fault = "has a name that is not UTF-8"
    else:
        if name and len(name) <= MAX_FILENAME_LEN and name.isprintable():
            return name
        fault = f"needs a name of 1 to {MAX_FILENAME_LEN} printable characters"
    raise wrong("file", fault)


def _check_purpose(purpose: str | None) -> None:
    if purpose is None:
        raise wrong(_PURPOSE, "is missing", "missing_required_parameter")
    if purpose != "batch":
        raise wrong(_PURPOSE, "must be batch: files of other purposes are not served")


def _life_s(anchor: str | None, seconds: str | None) -> int:
    if anchor is None and seconds is None:
        return DEFAULT_LIFE_S
    if anchor != "created_at":
        raise wrong("expires_after.anchor", "must be created_at")
    digits = seconds or ""
    if not digits.isascii() or not digits.isdigit() or len(digits) > 8:
        raise wrong("expires_after.seconds", "must be a whole number")
    if not LIFE_S[0] <= int(digits) <= LIFE_S[1]:
        raise wrong("expires_after.seconds", f"must be from {LIFE_S[0]} to {LIFE_S[1]}")
    return int(digits)


async def read_upload(
    chunks: AsyncIterator[bytes], form: UploadForm, folder: DataFolder
) -> UploadFields:
    """Read a body to its end. The parser and the disk work in a thread. Raises ApiError."""
    unread = bytearray()
    async for chunk in chunks:
        unread += chunk
        if len(unread) >= _PIECE_BYTES:
            piece, unread = bytes(unread), bytearray()
            await folder.run(form.feed, piece)
    await folder.run(form.feed, bytes(unread))
    return form.finish()
