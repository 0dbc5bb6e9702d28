"""`sagellm engine list | register | remove`: the servers behind the graphs that run."""

import re
from typing import Annotated

import msgspec
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import Failure
from sagellm.cli.workers import GraphPid, answers
from sagellm.runtime.cluster.control import ControlReply, ControlRequest, ServerStatus, ask

_COLUMNS = ("graph", "server", "state", "run", "model", "url")

AsJson = Annotated[bool, Parameter(help="Print objects, as `list --json`.")]


def list_(*, json: bool = False) -> int:
    """List the servers of engines of kind openai, in the graphs that you serve on this machine.

    Parameters
    ----------
    json
        Print a list of objects: graph, engine, replica, url, model, state, num_running.
    """
    found = trio.run(answers, ControlRequest("servers")).values()
    _print([server for answer in found for server in answer.servers], json)
    return 0


def register(engine: str, url: str, /, *, graph_pid: GraphPid = None, json: AsJson = False) -> int:
    """Add a server to an engine of a running graph; returns once it has answered and is used.

    Parameters
    ----------
    engine
        An engine of kind openai.
    url
        The address of the server, such as http://10.0.0.3:8000.
    """
    return _change(ControlRequest("register", engine=engine, url=url), graph_pid, json)


def remove(
    server: str, /, *, force: bool = False, graph_pid: GraphPid = None, json: AsJson = False
) -> int:
    """Give a server no more requests, and remove it after its last answer.

    Parameters
    ----------
    server
        An engine and the number of its server, as `sagellm engine list` shows it: far[1].
    force
        Let its answers go on at other servers at once.
    """
    found = re.fullmatch(r"(.+)\[(\d+)\]", server)
    if found is None:
        raise Failure(f"{server} names no server", "write an engine and a number, as far[1]")
    asked = ControlRequest("remove", engine=found[1], replica=int(found[2]), force=force)
    return _change(asked, graph_pid, json)


def _change(asked: ControlRequest, graph_pid: int | None, json: bool) -> int:
    _print(trio.run(_ask_one_graph, asked, graph_pid).servers, json)
    return 0


async def _ask_one_graph(asked: ControlRequest, graph_pid: int | None) -> ControlReply:
    """Send a request to the graph of `graph_pid`, or to the only graph with servers.

    Raises Failure if no graph or several graphs match, and if the graph answers with an error.
    """
    listed = {
        path: answer.servers[0]
        for path, answer in (await answers(ControlRequest("servers"))).items()
        if answer.servers and graph_pid in (None, answer.servers[0].graph_pid)
    }
    if not listed:
        cause = "no graph with an engine of kind openai is served here"
        raise Failure(cause, "sagellm ps lists what runs")
    if len(listed) > 1:
        known = ", ".join(f"{one.graph} ({one.graph_pid})" for one in listed.values())
        raise Failure(f"which graph? There are {known}", "name one of them by --graph-pid")
    try:
        answer = await ask(next(iter(listed)), asked)
    except (OSError, trio.BrokenResourceError):  # it answered a moment ago
        raise Failure("the graph ended meanwhile", "sagellm ps lists what runs") from None
    if answer.error:
        raise Failure(answer.error, "sagellm engine list shows engines and servers")
    return answer


def _print(servers: "list[ServerStatus] | tuple[ServerStatus, ...]", json: bool) -> None:
    if json:
        print(msgspec.json.encode(servers).decode())
        return
    if not servers:
        print("no graph with an engine of kind openai is served here")
        return
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name)
    for one in servers:
        server = f"{one.engine}[{one.replica}]"
        table.add_row(one.graph, server, one.state, str(one.num_running), one.model, one.url)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
