"""`sagellm replay`: replays a decision log in a new core, and prints the first difference."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import FAILED, Failure, simulation_failure
from sagellm.cli.graph_argument import Assignments, Imports, import_code, parse_assignments
from sagellm.opening.decisions import ReplayDifference, ReplayResult, replay
from sagellm.runtime.core.decision_log import DecisionReader, LogError
from sagellm.runtime.core.events import Event
from sagellm.runtime.messages import SERVED
from sagellm.runtime.registry import FUNCTIONS
from sagellm.runtime.simulation.timeline import SimulationError
from sagellm.simulation.figures import latency
from sagellm.simulation.simulation_run import SimulatedRequest
from sagellm.simulation.what_if import WhatIf, what_if

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
    with_: Annotated[tuple[str, ...], Parameter(name="--with")] = (),
    profile: str = "",
    import_: Imports = (),
    json: bool = False,
) -> int:
    """Replay the decisions of a graph that was run or served with --decisions, and compare.

    Exit code 1, and the first decision that differs, where one does. With --with, simulate the
    requests of the log instead, as the graph was and with other options.

    Parameters
    ----------
    log
        What --decisions wrote.
    set_
        Change an option of the graph, as sort.policy=fifo: where would that decide otherwise? May
        be repeated.
    with_
        What would other options have cost, as sort.policy=fifo? May be repeated.
    profile
        The cost model of engines that compute, for --with, as `sagellm simulate` takes it.
    json
        Print one JSON object.
    """
    import_code(import_)
    _check(set_, with_, profile)
    if with_:
        return _compare(log, with_, profile, json=json)
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


def _check(set_: Assignments, with_: tuple[str, ...], profile: str) -> None:
    """Raise Failure for options that contradict each other."""
    if set_ and with_:
        cause = "--set decides the events of the log again, and --with simulates its requests"
        raise Failure(cause, "give one of them")
    if profile and not with_:
        raise Failure("--profile is of simulated engines, and nothing is simulated", "add --with")


def _compare(log: Path, with_: tuple[str, ...], profile: str, *, json: bool) -> int:
    """Simulate the requests of a log twice, and print how their times differ."""
    try:
        with log.open("rb") as file:
            found = what_if(DecisionReader(file), parse_assignments(with_), profile)
    except OSError as error:
        raise Failure(f"{error.strerror}", "name a file that --decisions wrote", str(log)) from None
    except LogError as error:
        raise Failure(str(error), "name a file that --decisions wrote", str(log)) from None
    except SimulationError as error:
        raise simulation_failure(error, str(log)) from None
    if json:
        for one in found:
            print(msgspec.json.encode(_difference(one)).decode())
    else:
        _show_comparison(found, " ".join(with_))
    return 0


def _difference(one: WhatIf) -> dict[str, Any]:
    return {
        "request_id": one.path.request_id,
        "choice": one.path.choice,
        "recorded": {"ttft_s": one.path.ttft_s, "e2e_s": one.path.e2e_s, "end": one.path.end},
        "simulated": _times(one.as_it_was),
        "changed": _times(one.changed),
        "gain_s": one.gain_s,
    }


def _times(request: SimulatedRequest) -> dict[str, Any]:
    return {"ttft_s": request.ttft_s, "e2e_s": request.e2e_s, "end": request.end}


def _show_comparison(found: list[WhatIf], options: str) -> None:
    """Print the times of all requests in three runs, and the requests that differ most."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"changed: {options}", markup=False)
    table = Table("ms", "TTFT p50", "TTFT p99", "end to end p50", "p99", "served")
    runs = {
        "recorded": [(one.path.ttft_s, one.path.e2e_s, one.path.end) for one in found],
        "simulated": [tuple(_times(one.as_it_was).values()) for one in found],
        "changed": [tuple(_times(one.changed).values()) for one in found],
    }
    for name, times in runs.items():
        served = [one for one in times if one[2] in SERVED]
        cells = [latency(one[0] for one in served), latency(one[1] for one in served)]
        shown = [f"{v:.1f}" for one in cells for v in ((one.p50, one.p99) if one else ())]
        table.add_row(name, *(shown or [""] * 4), f"{len(served)} of {len(times)}")
    console.print(table)
    both = [one for one in found if one.as_it_was.is_ok and one.changed.is_ok]
    ordered = sorted(both, key=lambda one: one.gain_s)
    for title, few in (("would lose most", ordered[:3]), ("would gain most", ordered[-3:][::-1])):
        named = ", ".join(f"{one.path.request_id} {one.gain_s * 1e3:+.1f} ms" for one in few)
        console.print(f"{title}: {named}", markup=False)


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
