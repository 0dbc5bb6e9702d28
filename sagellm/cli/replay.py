"""`sagellm replay`: replays a decision log in a new core, and prints the first difference."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import FAILED, Failure, simulation_failure
from sagellm.cli.graph_argument import Assignments, Imports, import_code, parse_assignments
from sagellm.cli.shadow_report import difference_object, shadow_object, show_shadows
from sagellm.experiments.disagreements import has_shadows, shadow_report
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
    most: Annotated[int, Parameter(validator=Number(gte=0))] = 5,
    import_: Imports = (),
    json: bool = False,
) -> int:
    """Replay the decisions of a graph that was run or served with --decisions, and compare.

    Exit code 1, and the first decision that differs, where one does. If the graph has shadows, what
    they would have decided otherwise is shown, too. With --with, every decision is compared with
    that of other options, and the requests of the log are simulated with both.

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
    most
        How many decisions of each kind that would differ to list.
    json
        Print one JSON object; with --with, one for each request.
    """
    import_code(import_)
    _check(set_, with_, profile)
    if with_:
        return _compare(log, with_, profile, most, json=json)
    try:
        found = replay(log, functions=FUNCTIONS, overrides=parse_assignments(set_))
        shadows = shadow_report(log, FUNCTIONS) if not set_ and has_shadows(log) else None
    except OSError as error:
        raise Failure(f"{error.strerror}", "name a file that --decisions wrote", str(log)) from None
    except LogError as error:
        raise Failure(str(error), "name a file that --decisions wrote", str(log)) from None
    if json:
        whole = asdict(found) if shadows is None else {**asdict(found), **shadow_object(shadows)}
        print(msgspec.json.encode(whole).decode())
    else:
        _show(found)
        if shadows is not None:
            show_shadows(shadows, most)
    return 0 if found.difference is None else FAILED


def _check(set_: Assignments, with_: tuple[str, ...], profile: str) -> None:
    """Raise Failure for options that contradict each other."""
    if set_ and with_:
        cause = "--set decides the events of the log again, and --with simulates its requests"
        raise Failure(cause, "give one of them")
    if profile and not with_:
        raise Failure("--profile is of simulated engines, and nothing is simulated", "add --with")


def _compare(log: Path, with_: tuple[str, ...], profile: str, most: int, *, json: bool) -> int:
    """Compare each decision of a log, then simulate its requests twice, and print both."""
    overrides = parse_assignments(with_)
    try:
        differences = shadow_report(log, FUNCTIONS, overrides)
        if not json:
            print(f"changed: {' '.join(with_)}")
            show_shadows(differences, most)
        with log.open("rb") as file:
            found = what_if(DecisionReader(file), overrides, profile)
    except OSError as error:
        raise Failure(f"{error.strerror}", "name a file that --decisions wrote", str(log)) from None
    except LogError as error:
        raise Failure(str(error), "name a file that --decisions wrote", str(log)) from None
    except SimulationError as error:
        raise simulation_failure(error, str(log)) from None
    if json:
        by_request: dict[str, list[dict[str, Any]]] = {}
        for each in differences.differences:
            by_request.setdefault(each.note.request_id, []).append(difference_object(each))
        for one in found:
            differ = by_request.get(one.path.request_id, [])
            print(msgspec.json.encode({**_difference(one), "differences": differ}).decode())
    else:
        _show_comparison(found)
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


def _show_comparison(found: list[WhatIf]) -> None:
    """Print the times of all requests in three runs, and the requests that differ most."""
    console = Console(highlight=False, soft_wrap=True)
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
