"""`sagellm gateway start | stop | restart | status | logs`: gateways in the background."""

import os
import sys
from time import time
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from sagellm.background import background_gateway as gateways
from sagellm.background.background_gateway import GatewayRecord
from sagellm.background.log_file import follow, last_lines
from sagellm.cli import APP
from sagellm.cli.config_file import ConfigFile, read_config
from sagellm.cli.errors import FAILED, Failure
from sagellm.cli.serve_options import CONFIG_FILE_OPTIONS, ConfigOptions, ListenOptions
from sagellm.cli.setting import WholeNumber, merge_given

_DEFAULT_GRAPH = "joint"
_NUM_LOG_LINES = 20  # shown of a gateway that did not start
_COLUMNS = ("port", "state", "pid", "up", "url", "serves")

Port = Annotated[
    WholeNumber | None,
    Parameter(name=["--port", "-p"], help="The gateway of this port; unless only one runs."),
]
WaitS = Annotated[float, Parameter(validator=Number(gte=0))]


def start(
    *args: Annotated[str, Parameter(allow_leading_hyphen=True)],
    foreground: bool = False,
    wait_s: WaitS = 120.0,
) -> int:
    """Start a gateway in the background; returns once it is ready.

    Parameters
    ----------
    args
        Those of `sagellm serve`: a graph or a model (joint unless given), and its options.
    foreground
        Stay in this terminal, as `sagellm serve` does.
    wait_s
        How long to wait until it is ready, in seconds; it goes on starting after that.
    """
    wanted = _serve_args(args)
    if foreground:
        os.execv(sys.executable, [sys.executable, "-m", "sagellm", "serve", *wanted])
    listen = _listen(wanted)
    if listen.port == 0:
        raise Failure("a gateway in the background needs a port of its own", "give --port N")
    with gateways.held(listen.port):
        known = gateways.find(listen.port)
        if known is not None and known.process is not None:
            raise Failure(
                f"a gateway of port {listen.port} runs already, as process {known.pid}",
                f"stop it by `sagellm gateway stop -p {listen.port}`, or choose another --port",
            )
        return _start(wanted, listen, os.getcwd(), wait_s)


def stop(*, port: Port = None, force: bool = False, wait_s: WaitS = 30.0) -> int:
    """Let a gateway finish what it serves, and end it.

    Parameters
    ----------
    force
        End open streams at once; kill what does not end.
    wait_s
        How long to wait for open streams, in seconds.
    """
    found = _chosen(port)
    with gateways.held(found.port):
        _stop(found, force=force, wait_s=wait_s)
    print(f"the gateway of port {found.port} has ended")
    return 0


def restart(*, port: Port = None, force: bool = False, wait_s: WaitS = 120.0) -> int:
    """Stop a gateway, and start it again as it was started.

    Parameters
    ----------
    force
        End open streams at once.
    wait_s
        How long to wait for its end, and until it is ready again, in seconds.
    """
    found = _chosen(port)
    with gateways.held(found.port):
        _stop(found, force=force, wait_s=wait_s)
        return _start(found.args, _listen(found.args), found.folder, wait_s)


def status(*, port: Port = None, json: bool = False) -> int:
    """List the gateways in the background. The exit code is 1 if none of them is ready.

    Parameters
    ----------
    json
        Print a list of objects: port, state, pid, up_s, url, args, log.
    """
    found = gateways.records() if port is None else [_chosen(port)]
    rows = [_row(one) for one in found]
    if json:
        print(msgspec.json.encode(rows).decode())
    else:
        _print(rows)
    return 0 if any(row["state"] == "ready" for row in rows) else FAILED


def logs(
    *,
    port: Port = None,
    follow_: Annotated[bool, Parameter(name=["--follow", "-f"])] = False,
    lines: Annotated[int, Parameter(name=["--lines", "-n"], validator=Number(gte=0))] = 50,
) -> int:
    """Print what a gateway has logged.

    Parameters
    ----------
    follow_
        Go on with what it logs from now on, until it ends.
    lines
        The number of lines of the past.
    """
    found = _chosen(port)
    path = gateways.log_path(found.port)
    try:
        for line in last_lines(path, lines):
            print(line)
        if follow_:
            for text in follow(path, lambda: found.process is None):
                print(text, end="", flush=True)
    except OSError as error:
        cause = f"its log cannot be read: {error.strerror}"
        raise Failure(cause, "it is kept as long as the gateway is", str(path)) from None
    return 0


def _serve_args(args: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of `serve`: `-p` is its `--port`, and the graph is `joint` unless given."""
    named = tuple("--port" if one == "-p" else one for one in args)
    return named if named and not named[0].startswith("-") else (_DEFAULT_GRAPH, *named)


def _listen(args: tuple[str, ...]) -> ListenOptions:
    """The address that `serve` would listen at. Raises what `serve` raises for wrong options."""
    _, bound, _ = APP.parse_args(["serve", *args], exit_on_error=False, print_error=False)
    options = bound.arguments.get("config_options", ConfigOptions())
    file = read_config(options.config, CONFIG_FILE_OPTIONS) if options.config else ConfigFile()
    listen: ListenOptions = merge_given(bound.arguments.get("listen", ListenOptions()), file.values)
    return listen


def _start(args: tuple[str, ...], listen: ListenOptions, folder: str, wait_s: float) -> int:
    is_tls = listen.tls_certificate is not None
    record = gateways.launch(args, host=listen.host, port=listen.port, is_tls=is_tls, folder=folder)
    try:
        state = gateways.wait_ready(record, wait_s)
    except BaseException:
        gateways.kill(record)
        gateways.forget(record.port)
        raise
    if state == "dead":
        gateways.forget(record.port)
        path = gateways.log_path(record.port)
        for line in last_lines(path, _NUM_LOG_LINES):
            print(line, file=sys.stderr)
        code = gateways.exit_code(record) or FAILED
        raise Failure("the gateway did not start", "see its last lines above", str(path), code)
    print(f"{record.url} is {'ready' if state == 'ready' else 'still starting'}")
    return 0 if state == "ready" else FAILED


def _stop(found: GatewayRecord, *, force: bool, wait_s: float) -> None:
    has_ended = gateways.kill(found) if force else gateways.end(found, wait_s)
    if not has_ended:
        raise Failure(
            f"the gateway of port {found.port} still finishes what it serves",
            "wait for it, or end it by --force",
            code=FAILED,
        )
    gateways.forget(found.port)


def _chosen(port: int | None) -> GatewayRecord:
    """The gateway of a port; without a port the only one that there is. Raises Failure."""
    known = gateways.records()
    ports = ", ".join(str(one.port) for one in known)
    if port is None and len(known) == 1:
        return known[0]
    found = next((one for one in known if one.port == port), None)
    if found is not None:
        return found
    if not known:
        raise Failure("no gateway runs in the background", "`sagellm gateway start` starts one")
    if port is None:
        raise Failure(f"several gateways run, of the ports {ports}", "choose one by --port")
    raise Failure(f"no gateway of port {port} was started", f"there are {ports}")


def _row(record: GatewayRecord) -> dict[str, object]:
    state = gateways.state_of(record)
    return {
        "port": record.port,
        "state": state,
        "pid": record.pid if state != "dead" else None,
        "up_s": round(time() - record.created_s, 1) if state != "dead" else None,
        "url": record.url,
        "args": record.args,
        "log": str(gateways.log_path(record.port)),
    }


def _print(rows: list[dict[str, object]]) -> None:
    if not rows:
        print("no gateway runs in the background; `sagellm gateway start` starts one")
        return
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name)
    for row in rows:
        pid, up_s = row["pid"] or "", row["up_s"]
        up = "" if up_s is None else f"{up_s:.0f} s"
        serves = " ".join(map(str, row["args"]))  # type: ignore[call-overload]
        table.add_row(str(row["port"]), str(row["state"]), str(pid), up, str(row["url"]), serves)
    Console(soft_wrap=True).print(table)
