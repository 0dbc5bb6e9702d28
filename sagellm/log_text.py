"""Log lines for people: time, level, event and its fields, aligned; one line an event."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from structlog.typing import EventDict

_CALL = "call_ended"
_DIM, _BOLD, _RED, _GREEN, _YELLOW, _CYAN = "2", "1", "31", "32", "33", "36"
_LEVELS = {
    "debug": _DIM,
    "info": _GREEN,
    "warning": _YELLOW,
    "error": _RED,
    "critical": _RED,
}
_STATUSES = {400: _GREEN, 500: _YELLOW, 1000: _RED}  # the colour of those below
_CLOCK = slice(11, 23)  # of an ISO time: hours to milliseconds


class TextLines:
    """A structlog renderer. Control characters are escaped, and so is what turns text around: no
    value can begin a line, or look like another field.
    """

    def __init__(self, *, has_colours: bool) -> None:
        self._has_colours = has_colours

    def __call__(self, _: object, __: str, line: EventDict) -> str:
        time, level, event = line.pop("timestamp"), line.pop("level"), str(line.pop("event"))
        logger, exception = line.pop("logger", ""), line.pop("exception", "")
        rest = self._call(line) if event == _CALL else self._fields(line)
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
        """The columns of a call, and whatever else is known of it."""
        left = dict(line)
        left.pop("route", None)  # the path says more
        status = left.pop("status", 0)
        yield self._painted(f"{status}", next(_STATUSES[at] for at in _STATUSES if status < at))
        for column, width in _COLUMNS:
            yield f"{column(left):{width}}"
        yield from self._fields(left)

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._has_colours else text


def escaped(text: str) -> str:
    """The text on one line, with nothing that a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _shown(value: object) -> str:
    """A value without blanks as it is, another in quotation marks."""
    text = escaped(str(value)).replace('"', r"\"")
    return f'"{text}"' if not text or " " in text or "=" in text else text


def _what(line: dict[str, Any]) -> str:
    return escaped(f"{line.pop('method', ''):4} {line.pop('path', '')}")


def _tokens(line: dict[str, Any]) -> str:
    asked, made = line.pop("num_prompt_tokens", None), line.pop("num_output_tokens", None)
    return "" if asked is None else f"{asked}+{made} tokens"


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


def _who(line: dict[str, Any]) -> str:
    return escaped(line.pop("tenant", None) or "-")


def _request_id(line: dict[str, Any]) -> str:
    return escaped(str(line.pop("request_id", "")))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


_COLUMNS: tuple[tuple[Callable[[dict[str, Any]], str], int], ...] = (
    (_what, 25),
    (_tokens, 15),
    (_ttft, 13),
    (_rate, 14),
    (_seconds, 8),
    (_client, 15),
    (_who, 9),
    (_request_id, 0),
)
