"""Redacts log lines, renders them as text, and writes them in a thread."""

import os
import re
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from hashlib import blake2b
from typing import Any

from structlog.typing import EventDict

REDACTED = "[redacted]"
_MAX_DEPTH = 8
_SECRET_NAMES = re.compile(
    r"authorization|cookie|password|passwd|secret|credential"
    r"|(^|[_-])(api|admin|salt|access|private|hf)[_-]?(key|token)s?$|^(token|key|keys|bearer)$",
    re.IGNORECASE,
)
_SECRET_TEXTS = re.compile(
    r"(?i:\b(bearer|basic)\s+)[^\s\"',;]+"
    r"|(?<![A-Za-z0-9])(?:sk|pk|hf|ghp|xoxb)[-_][A-Za-z0-9_-]{8,}"
    r"|(?i:((?:api|admin)[-_]?key|token|password)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
)
# Fields with users' content. Their values are not logged at any level.
_CONTENT_NAMES = frozenset(
    {"prompt", "prompts", "messages", "content", "text", "input", "inputs", "completion", "output",
     "body", "stop", "token_ids", "prompt_token_ids", "emitted_token_ids", "emitted_text"}
)  # fmt: skip


class Redactor:
    """A structlog processor that removes secrets and users' content. `known`: secrets to remove.

    `key`: the key for hashes of prompts, random by default. Under one key, equal prompts have equal
    hashes; without the key, a hash reveals nothing about its prompt.
    """

    def __init__(self, key: bytes = b"", known: Iterable[str] = ()) -> None:
        self._key = key[:64] or secrets.token_bytes(32)  # 64 bytes is blake2b's limit
        # One secret may contain another: the longest must match first.
        longest_first = sorted((text for text in known if text), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(
        self, logger: object, method: str, line: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        for name in tuple(line):
            line[name] = self.clean(line[name], name)
        return line

    def describe(self, content: object) -> dict[str, object]:
        """The length and a keyed hash of a prompt, which are logged instead of the prompt."""
        text = content if isinstance(content, str) else repr(content)
        digest = blake2b(text.encode(errors="surrogatepass"), key=self._key, digest_size=8)
        size = len(content) if isinstance(content, str | list | tuple | dict) else len(text)
        return {"len": size, "hash": digest.hexdigest()}

    def clean(self, value: Any, name: str = "", depth: int = 0) -> Any:
        """The value without secrets and content. `name`: its field, whose name may mark it."""
        if value is None or isinstance(value, bool | int | float):
            return REDACTED if value and _SECRET_NAMES.search(name) else value
        if _SECRET_NAMES.search(name):
            return REDACTED
        if name.lower() in _CONTENT_NAMES:
            return self.describe(value)
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple | set | frozenset) and depth < _MAX_DEPTH:
            return [self.clean(each, depth=depth + 1) for each in value]
        return self.text(value if isinstance(value, str) else repr(value))

    def text(self, text: str) -> str:
        """The text with known secrets, and strings that look like secrets, replaced."""
        return _SECRET_TEXTS.sub(_redact_value, self._known.sub(REDACTED, text))

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> Any:
        if depth >= _MAX_DEPTH:
            return "..."
        return {
            self.text(str(key)): self.clean(each, str(key), depth + 1)
            for key, each in value.items()
        }


def _redact_value(match: re.Match[str]) -> str:
    name = match[1] + " " if match[1] else match[2] or ""
    return name + REDACTED


_CALL_EVENT = "call_ended"
_DIM, _BOLD, _RED, _GREEN, _YELLOW, _CYAN = "2", "1", "31", "32", "33", "36"
_LEVELS = {
    "debug": _DIM,
    "info": _GREEN,
    "warning": _YELLOW,
    "error": _RED,
    "critical": _RED,
}
_STATUSES = {400: _GREEN, 500: _YELLOW, 1000: _RED}  # status below the key -> colour
_CLOCK = slice(11, 23)  # hours to milliseconds in an ISO time


class TextRenderer:
    """A structlog renderer: one line for each event, with time, level, event and fields in columns.

    Control characters and bidirectional marks are escaped, so that no value can begin a new line or
    look like another field.
    """

    def __init__(self, *, has_colours: bool) -> None:
        self._has_colours = has_colours

    def __call__(self, _: object, __: str, line: EventDict) -> str:
        time, level, event = line.pop("timestamp"), line.pop("level"), str(line.pop("event"))
        logger, exception = line.pop("logger", ""), line.pop("exception", "")
        rest = self._call(line) if event == _CALL_EVENT else self._fields(line)
        head = [
            self._painted(time[_CLOCK], _DIM),
            self._painted(f"{level:7}", _LEVELS.get(level, _BOLD)),
            self._painted(f"{escaped(event):18}", _BOLD),
        ]
        whole = " ".join([*head, *([f"({escaped(logger)})"] if logger else []), *rest]).rstrip()
        return "\n    ".join([whole, *map(escaped, str(exception).splitlines())])

    def _fields(self, line: Mapping[str, Any]) -> Iterator[str]:
        for name in [name for name, value in line.items() if value not in (None, "")]:
            yield f"{self._painted(escaped(name), _CYAN)}={_shown(line[name])}"

    def _call(self, line: Mapping[str, Any]) -> Iterator[str]:
        """The columns of an HTTP call, followed by its other fields."""
        rest = dict(line)
        rest.pop("route", None)  # the column of the path contains it
        status = rest.pop("status", 0)
        yield self._painted(f"{status}", next(_STATUSES[at] for at in _STATUSES if status < at))
        for column, width in _COLUMNS:
            yield f"{column(rest):{width}}"
        yield from self._fields(rest)

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours else text


def escaped(text: str) -> str:
    """The text on one line, with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _shown(value: object) -> str:
    """The value as text, in quotation marks if it is empty or contains a blank or `=`."""
    text = escaped(str(value)).replace('"', r"\"")
    return f'"{text}"' if not text or " " in text or "=" in text else text


def _call_target(line: dict[str, Any]) -> str:
    return escaped(f"{line.pop('method', ''):4} {line.pop('path', '')}")


def _tokens(line: dict[str, Any]) -> str:
    num_prompt, num_output = (
        line.pop("num_prompt_tokens", None),
        line.pop("num_output_tokens", None),
    )
    return "" if num_prompt is None else f"{num_prompt}+{num_output} tokens"


def _ttft(line: dict[str, Any]) -> str:
    seconds = line.pop("ttft_s", None)
    return "" if seconds is None else f"TTFT {_duration(seconds)}"


def _rate(line: dict[str, Any]) -> str:
    rate = line.pop("tokens_per_s", None)
    return "" if rate is None else f"{rate:.4g} tokens/s"


def _seconds(line: dict[str, Any]) -> str:
    return _duration(line.pop("seconds", 0.0))


def _client(line: dict[str, Any]) -> str:
    return escaped(line.pop("client", None) or "-")


def _tenant(line: dict[str, Any]) -> str:
    return escaped(line.pop("tenant", None) or "-")


def _request_id(line: dict[str, Any]) -> str:
    return escaped(str(line.pop("request_id", "")))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


_COLUMNS: tuple[tuple[Callable[[dict[str, Any]], str], int], ...] = (
    (_call_target, 25),
    (_tokens, 15),
    (_ttft, 13),
    (_rate, 14),
    (_seconds, 8),
    (_client, 15),
    (_tenant, 9),
    (_request_id, 0),
)


_MOST_BYTES = 1 << 20  # limit of queued lines; more are dropped
_ERASE = b"\r\x1b[2K"
_CLOSE_S = 1.0  # for writing queued lines at the end


def _dropped(num: int) -> str:
    return f'{{"event": "logs_dropped", "num": {num}}}'


class LogWriter:
    """Writes lines to stderr in a thread, so that logging never waits for a slow reader of stderr.

    A line is dropped and counted if the queue is full or the line cannot be written (a full disk).
    After the next successful write, a further line reports the number of dropped lines.
    """

    def __init__(self, dropped: Callable[[int], str] = _dropped) -> None:
        """`dropped`: number of dropped lines -> the line that reports this number."""
        self.num_dropped = 0
        self.takes_line = False  # True: erase the terminal's line, where a progress bar may be
        self._dropped = dropped
        self._num_told = 0
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        line = text.encode("utf-8", "replace")
        with self._changed:
            if self._is_closed or self._num_bytes + len(line) > _MOST_BYTES:
                self.num_dropped += 1
            else:
                self._lines.append(line)
                self._num_bytes += len(line)
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes each line as soon as it can."""

    def close(self) -> None:
        """Accept no more lines, and wait up to _CLOSE_S until the queued lines are written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._is_closed:
                    self._changed.wait()
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._num_bytes -= len(line)
            is_written = write_line(_ERASE + line if self.takes_line else line)
            with self._changed:
                self.num_dropped += not is_written
                num_new = self.num_dropped - self._num_told
            if is_written and num_new and write_line(f"{self._dropped(num_new)}\n".encode()):
                self._num_told += num_new


def write_line(line: bytes) -> bool:
    """Write a line to stderr, and return whether the whole line was written. Raises nothing.

    Writes to the descriptor of stderr, if it has one: a blocked write to the buffered stream would
    hold the stream's lock, and so block every other `print`.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = None
    try:
        if descriptor is None:
            sys.stderr.write(line.decode("utf-8"))
        else:
            while line:
                line = line[os.write(descriptor, line) :]
    except (AttributeError, OSError, ValueError):
        return False
    return True
