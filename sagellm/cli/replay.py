"""`sagellm replay`: replays a decision log in a new core, and prints the first difference."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from sagellm.cli.errors import FAILED, Failure
from sagellm.cli.graph_argument import Assignments, Imports, import_code, parse_assignments
from sagellm.opening.decisions import ReplayDifference, ReplayResult, replay
from sagellm.runtime.core.decision_log import LogError
from sagellm.runtime.core.events import Event
from sagellm.runtime.registry import FUNCTIONS

_MAX_EFFECTS = 20  # printed effects of an event
_MAX_LINE_LEN = 200
_FIELDS = (
    "type",
    "request_id",
    "choice",
    "epoch",
    "position",
    "finish_reason",
    "code",
    "placement",
)
_NESTED = ("request", "event")  # fields that hold another message about the request


def run(
    log: Path,
    /,
    *,
    set_: Assignments = (),
    import_: Imports = (),
    json: bool = False,
) -> int:
    """Replay the decisions of a graph that was run or served with --decisions, and compare.

    Exit code 1, and the first decision that differs, where one does.

    Parameters
    ----------
    log
        What --decisions wrote.
    set_
        Change an option of the graph, as sort.policy=fifo: where would that decide otherwise? May
        be repeated.
    json
        Print one JSON object.
    """
    import_code(import_)
    try:
        found = replay(log, functions=FUNCTIONS, overrides=parse_assignments(set_))
    except OSError as error:
        raise Failure(f"{error.strerror}", "name a file that --decisions wrote", str(log)) from None
    except LogError as error:
        raise Failure(str(error), "name a file that --decisions wrote", str(log)) from None
    if json:
        print(msgspec.json.encode(asdict(found)).decode())
    else:
        _show(found)
    return 0 if found.difference is None else FAILED


def _show(found: ReplayResult) -> None:
    cut = "; the log ends before its graph did" if found.is_cut else ""
    counts = f"{found.num_events} events, {found.num_effects} effects"
    if found.difference is None:
        print(f"identical: {counts}{cut}")
        return
    print(f"the same until event {found.difference.number}: {counts}{cut}")
    _show_difference(found.difference)


def _show_difference(difference: ReplayDifference) -> None:
    print(f"event {difference.number}, at {difference.now_s:.6f} s: {event_line(difference.event)}")
    for title, effects in (("recorded", difference.recorded), ("replayed", difference.replayed)):
        print(f"  {title}:" if effects else f"  {title}: nothing")
        for line in effect_lines(effects, _MAX_EFFECTS):
            print(f"    {line}")


def event_line(event: Event) -> str:
    """The event as one line of text."""
    return _line(msgspec.to_builtins(event, enc_hook=repr))


def effect_lines(effects: list[Any], most: int) -> Iterator[str]:
    """The first `most` effects as lines, then a line with the number of further effects."""
    yield from (_line(effect) for effect in effects[:most])
    if len(effects) > most:
        yield f"and {len(effects) - most} more"


def _line(message: list[Any]) -> str:
    words = [_words(part) for part in message]
    return " ".join(word for word in words if word)[:_MAX_LINE_LEN]


def _words(part: Any) -> str:
    """A value as text. A message is shortened to the fields that identify its request."""
    if isinstance(part, Mapping):
        inner = next((part[name] for name in _NESTED if isinstance(part.get(name), Mapping)), None)
        shown = {name: part[name] for name in _FIELDS if part.get(name) not in (None, "", 0, {})}
        words = " ".join(f"{name}={value}" for name, value in shown.items())
        return f"({words}{' ' + _words(inner) if inner is not None else ''})"
    if isinstance(part, list | tuple):
        return f"[{', '.join(_words(one) for one in part[:4])}{', ...' if len(part) > 4 else ''}]"
    return "" if part is None else str(part)
