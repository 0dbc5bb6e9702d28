"""Effects and events of a log of decisions as lines for a person, without what requests say."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from sagellm.runtime.core.events import Event

_MOST_CHARACTERS = 200
_SHOWN = ("type", "request_id", "choice", "epoch", "position", "finish_reason", "code", "placement")
_OF = ("request", "event")  # the parts of a message that say which request it is of


def event_line(event: Event) -> str:
    """One event."""
    return _line(msgspec.to_builtins(event, enc_hook=repr))


def effect_lines(effects: list[Any], most: int) -> Iterator[str]:
    """The first `most` effects, each a line, and how many more there are."""
    yield from (_line(effect) for effect in effects[:most])
    if len(effects) > most:
        yield f"and {len(effects) - most} more"


def _line(message: list[Any]) -> str:
    words = [_words(part) for part in message]
    return " ".join(word for word in words if word)[:_MOST_CHARACTERS]


def _words(part: Any) -> str:
    """A message inside by its names and numbers, a plain value as it is."""
    if isinstance(part, Mapping):
        inner = next((part[name] for name in _OF if isinstance(part.get(name), Mapping)), None)
        shown = {name: part[name] for name in _SHOWN if part.get(name) not in (None, "", 0, {})}
        words = " ".join(f"{name}={value}" for name, value in shown.items())
        return f"({words}{' ' + _words(inner) if inner is not None else ''})"
    if isinstance(part, list | tuple):
        return f"[{', '.join(_words(one) for one in part[:4])}{', ...' if len(part) > 4 else ''}]"
    return "" if part is None else str(part)
