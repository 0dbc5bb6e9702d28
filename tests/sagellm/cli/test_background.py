"""`sagellm gateway`: gateways in the background, as a user starts and ends them."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sagellm.background import background_gateway as gateways
from sagellm.cli import main

GRAPH = ("joint", "--set", "g.kind=modelled", "--set", "g.model=null")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield tmp_path
    for record in gateways.records():
        gateways.kill(record)
    ended = [one for one in psutil.Process().children() if one.status() == psutil.STATUS_ZOMBIE]
    assert ended == []


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


Command = Callable[..., str]


@pytest.fixture
def gateway(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command, check its exit code, and return what it printed to both outputs."""

    def run(*args: object, code: int = 0) -> str:
        found = main(["gateway", *map(str, args)])
        out, err = capsys.readouterr()
        assert found == code, err
        return out + err

    return run


def rows(text: str) -> Any:
    return json.loads(text)


def pid_of(port: int) -> int:
    record = gateways.find(port)
    assert record is not None
    return record.pid


def test_one_is_started_seen_restarted_and_stopped(gateway: Command, port: int) -> None:
    assert "is ready" in gateway("start", *GRAPH, "-p", port)
    (row,) = rows(gateway("status", "--json"))
    assert (row["port"], row["state"]) == (port, "ready")
    assert row["args"] == [*GRAPH, "--port", str(port)]
    assert "readiness" in gateway("logs")
    first = pid_of(port)
    assert "is ready" in gateway("restart")
    assert pid_of(port) != first
    assert not psutil.pid_exists(first)
    assert gateways.log_path(port).with_name(f"{port}.log.1").exists()
    second = pid_of(port)
    assert "has ended" in gateway("stop")
    assert gateways.records() == []
    assert not psutil.pid_exists(second)
    assert "no gateway runs" in gateway("status", code=1)


def test_two_are_told_apart_by_their_ports(gateway: Command, port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = int(free.getsockname()[1])
    gateway("start", *GRAPH, "--port", port)
    gateway("start", *GRAPH, "--port", other)
    assert f"of the ports {min(port, other)}, {max(port, other)}" in gateway("stop", code=2)
    gateway("stop", "-p", other)
    (row,) = rows(gateway("status", "--json"))
    assert (row["port"], row["state"]) == (port, "ready")


def test_a_port_that_is_taken_is_refused(gateway: Command, port: int) -> None:
    gateway("start", *GRAPH, "-p", port)
    pid = pid_of(port)
    assert f"runs already, as process {pid}" in gateway("start", *GRAPH, "-p", port, code=2)
    assert pid_of(port) == pid


def test_one_that_cannot_start_shows_why_and_leaves_no_record(gateway: Command, port: int) -> None:
    shown = gateway("start", "no-such-graph", "-p", port, code=2)
    assert "there is no graph and no model of that name" in shown
    assert gateways.records() == []


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--port", "0"), "needs a port of its own"),
        (("--no-such-option",), "--no-such-option"),
        (("--port", "many"), "many"),
    ],
)
def test_wrong_options_are_refused_before_a_process_starts(
    gateway: Command, args: tuple[str, ...], why: str
) -> None:
    assert why in gateway("start", *GRAPH, *args, code=2)
    assert gateways.records() == []


def test_one_that_was_killed_is_dead_and_can_be_started_again(gateway: Command, port: int) -> None:
    gateway("start", *GRAPH, "-p", port)
    os.kill(pid_of(port), signal.SIGKILL)
    os.waitpid(pid_of(port), 0)  # here it is a child, which the kernel keeps until it is asked
    assert rows(gateway("status", "--json", code=1))[0]["state"] == "dead"
    assert "is ready" in gateway("start", *GRAPH, "-p", port)


def test_another_process_of_the_same_number_is_not_the_gateway(port: int) -> None:
    mine = psutil.Process()
    record = gateways.GatewayRecord(
        port=port,
        host="127.0.0.1",
        is_tls=False,
        pid=mine.pid,
        created_s=mine.create_time() - 60,
        args=("joint",),
        folder="/",
    )
    assert record.process is None
    assert gateways.kill(record)  # and ends nothing


def test_force_ends_one_that_does_not_react(
    gateway: Command, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "_KILL_S", 0.5)
    gateway("start", *GRAPH, "-p", port)
    pid = pid_of(port)
    os.kill(pid, signal.SIGSTOP)
    assert "still finishes" in gateway("stop", "--wait-s", "0.1", code=1)
    assert "has ended" in gateway("stop", "--force")
    assert not psutil.pid_exists(pid)


def test_without_any_the_commands_say_so(gateway: Command) -> None:
    for command in ("stop", "restart", "logs"):
        assert "no gateway runs in the background" in gateway(command, code=2)
    assert gateway("status", "--json", code=1).strip() == "[]"


def test_records_and_logs_are_private(gateway: Command, port: int, state: Path) -> None:
    gateway("start", *GRAPH, "-p", port)
    folder = state / "sagellm" / "gateways"
    assert folder.stat().st_mode & 0o077 == 0
    assert all(each.stat().st_mode & 0o077 == 0 for each in folder.iterdir())
