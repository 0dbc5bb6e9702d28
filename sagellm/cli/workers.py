"""`sagellm ps`, `restart`, `drain`, `scale`: lists and controls workers of this user's graphs."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import trio
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import Failure
from sagellm.cli.setting import WholeNumber
from sagellm.runtime.cluster.control import (
    ControlReply,
    ControlRequest,
    ReplicaStatus,
    ask,
    running,
)

_NONE_RUNS = "sagellm serve GRAPH --executor processes runs one with workers"
_COLUMNS = ("graph", "graph pid", "operator", "pid", "state", "restarts", "run", "wait", "kv")

Replica = Annotated[WholeNumber | None, Parameter(validator=Number(gte=0), help="This one alone.")]
GraphPid = Annotated[
    WholeNumber | None,
    Parameter(
        help="The process of the graph that is meant, where several run; `sagellm ps` lists them."
    ),
]
AsJson = Annotated[bool, Parameter(help="Print them as `ps` does.")]


def ps(*, json: bool = False) -> int:
    """List what runs the graphs that you serve on this machine: workers, or one process.

    Parameters
    ----------
    json
        Print a list of objects: operator, replica, pid, state, restarts, executor, what it does.
    """
    rows = [row for rows in _rows_of(trio.run(answers, ControlRequest("ps"))) for row in rows]
    if json:
        print(msgspec.json.encode(rows).decode())
    else:
        _print(rows)
    return 0


def restart(
    operator: str, /, *, replica: Replica = None, graph_pid: GraphPid = None, json: AsJson = False
) -> int:
    """Replace the workers of an operator, one after the other; returns once they are ready.

    What runs goes on at a sibling, or waits for the new worker.

    Parameters
    ----------
    operator
        A name of the graph that has an engine, such as decode; decode[0] is its replica 0.
    """
    return _change(_request_for("restart", operator, replica), graph_pid, json)


def drain(
    operator: str, /, *, replica: Replica = None, graph_pid: GraphPid = None, json: AsJson = False
) -> int:
    """Give the workers of an operator nothing new, until they are restarted.

    What runs goes on at a sibling; where there is none, it ends where it is.

    Parameters
    ----------
    operator
        A name of the graph that has an engine, such as decode; decode[0] is its replica 0.
    """
    return _change(_request_for("drain", operator, replica), graph_pid, json)


def _request_for(
    command: Literal["drain", "restart"], operator: str, replica: int | None
) -> ControlRequest:
    """The control request for `operator`. `decode[0]`, as `ps` prints it, means its replica 0.

    Raises Failure if `replica` contradicts the number in `operator`.
    """
    found = re.fullmatch(r"(.+)\[(\d+)\]", operator)
    if found is None:
        return ControlRequest(command, operator, replica)
    if replica not in (None, int(found[2])):
        raise Failure(f"{operator} is not --replica {replica}", "name one of them")
    return ControlRequest(command, found[1], int(found[2]))


def scale(
    operator: str,
    count: Annotated[WholeNumber, Parameter(validator=Number(gte=1))],
    /,
    *,
    graph_pid: GraphPid = None,
    json: AsJson = False,
) -> int:
    """Change how many replicas the engine of an operator has; returns once they are ready, or gone.

    What runs in a worker that goes is taken over by the others.

    Parameters
    ----------
    operator
        A name of the graph that has an engine, such as decode.
    count
        The new number of replicas.
    """
    return _change(ControlRequest("scale", operator, count=count), graph_pid, json)


def _change(request: ControlRequest, graph_pid: int | None, json: bool) -> int:
    rows = trio.run(_ask_one_graph, request, graph_pid).rows
    if json:
        print(msgspec.json.encode(rows).decode())
    else:
        _print(rows)
    bad = ("ejected", "failing", "dead") if request.command == "restart" else ("ejected", "failing")
    failed = [row for row in rows if row.state in bad]
    if failed:
        first = failed[0]
        fix = "the log of the graph says more; it is tried again by itself"
        raise Failure(f"{first.operator}[{first.replica}]: {first.why}", fix)
    return 0


async def _ask_one_graph(request: ControlRequest, graph_pid: int | None) -> ControlReply:
    """Send `request` to the graph of `graph_pid`, or to the only graph with workers.

    Raises Failure if no graph or several graphs match, and if the graph answers with an error.
    """
    listed = {
        path: answer
        for path, answer in (await answers(ControlRequest("ps"))).items()
        if answer.rows and answer.rows[0].executor == "processes"  # `tasks` has no workers
    }
    if not listed:
        raise Failure("no graph with workers runs here", _NONE_RUNS)
    chosen = {
        path: answer.rows[0]
        for path, answer in listed.items()
        if graph_pid in (None, answer.rows[0].graph_pid)
    }
    if len(chosen) != 1:
        known = ", ".join(f"{rows[0].graph} ({rows[0].graph_pid})" for rows in _rows_of(listed))
        raise Failure(f"which graph? There are {known}", "name one of them by --graph-pid")
    try:
        answer = await ask(next(iter(chosen)), request)
    except (OSError, trio.BrokenResourceError):  # it answered `ps` a moment ago
        raise Failure("the graph ended meanwhile", "sagellm ps lists what runs") from None
    if answer.error:
        raise Failure(answer.error, "sagellm ps lists them")
    return answer


def _rows_of(listed: Mapping[Path, ControlReply]) -> list[tuple[ReplicaStatus, ...]]:
    return [answer.rows for answer in listed.values() if answer.rows]


async def answers(request: ControlRequest) -> dict[Path, ControlReply]:
    """Send `request` to every graph that this user runs: returns control socket -> answer."""
    found = {}
    for path in running():
        with suppress(OSError, trio.BrokenResourceError):  # the graph has just ended
            found[path] = await ask(path, request)
    return found


def _print(rows: Sequence[ReplicaStatus]) -> None:
    """Print a table that fits the terminal: long names of graphs and operators are folded."""
    if not rows:
        Console(stderr=True).print("no graph is served here", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name not in ("graph", "operator"))
    for row in rows:
        table.add_row(
            *(row.graph, str(row.graph_pid), f"{row.operator}[{row.replica}]"),
            *(str(row.pid or "-"), row.state),
            *(str(row.restarts), str(row.num_running), str(row.num_waiting), f"{row.kv_ratio:.0%}"),
        )
    Console(highlight=False, markup=False).print(table)
