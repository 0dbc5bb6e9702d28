"""`sagellm replay`: a log of decisions, given to a fresh core."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from sagellm.cli.effects import effect_lines, event_line
from sagellm.cli.failure import FAILED, Failure
from sagellm.cli.named import import_code
from sagellm.cli.options import settings
from sagellm.replay import Difference, Replayed, replay
from sagellm.runtime.core.decision_log import LogError
from sagellm.runtime.registry import FUNCTIONS

_MOST_SHOWN = 20  # effects of an event


def run(
    log: Path,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    import_: Annotated[tuple[str, ...], Parameter(name="--import")] = (),
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
    import_
        A dotted module or a .py file of yours, which registers what the graph uses; may be
        repeated.
    json
        Print one JSON object.
    """
    import_code(import_)
    try:
        found = replay(log, functions=FUNCTIONS, overrides=settings(set_))
    except OSError as error:
        raise Failure(f"{error.strerror}", "name a file that --decisions wrote", str(log)) from None
    except LogError as error:
        raise Failure(str(error), "name a file that --decisions wrote", str(log)) from None
    if json:
        print(msgspec.json.encode(asdict(found)).decode())
    else:
        _show(found)
    return 0 if found.difference is None else FAILED


def _show(found: Replayed) -> None:
    cut = "; the log ends before its graph did" if found.is_cut else ""
    counts = f"{found.num_events} events, {found.num_effects} effects"
    if found.difference is None:
        print(f"identical: {counts}{cut}")
        return
    print(f"the same until event {found.difference.number}: {counts}{cut}")
    _show_difference(found.difference)


def _show_difference(difference: Difference) -> None:
    print(f"event {difference.number}, at {difference.now_s:.6f} s: {event_line(difference.event)}")
    for title, effects in (("recorded", difference.recorded), ("replayed", difference.replayed)):
        print(f"  {title}:" if effects else f"  {title}: nothing")
        for line in effect_lines(effects, _MOST_SHOWN):
            print(f"    {line}")
