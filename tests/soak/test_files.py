"""400 connections to a process with at most 256 open files: it waits, and goes on serving."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from gateway_process import ServedProcess, served_process
from gateway_served import get

NUM_FILES, NUM_CONNECTIONS = 256, 400
RELEASE_S = 1.0


def limit_files(pid: int = 0) -> None:
    """Limit the open files of this process or of another one."""
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (NUM_FILES, NUM_FILES))


@pytest.fixture(params=["hypercorn", "uvicorn"])
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["known", "unforeseen"])
def served(server: str, request: pytest.FixtureRequest) -> Iterator[ServedProcess]:
    """A server that is limited from the start, and knows it; or limited while it runs."""
    is_known = request.param == "known"
    with served_process("--server", server, preexec_fn=limit_files if is_known else None) as found:
        if not is_known:
            limit_files(found.process.pid)
        yield found


def test_more_connections_than_files(served: ServedProcess) -> None:
    assert served.complete()
    before = served.process.num_fds()
    with ExitStack() as stack:
        socks = [stack.enter_context(connected(served)) for _ in range(NUM_CONNECTIONS)]
        assert is_answered(socks[0])
        assert served.process.num_fds() <= NUM_FILES
        assert is_answered(socks[1])
    released_s = time.monotonic()
    assert served.complete()
    assert time.monotonic() - released_s <= RELEASE_S
    assert settled_files(served, before) <= before + 1


def connected(served: ServedProcess) -> socket.socket:
    """A connection that the kernel accepts before the server does."""
    return socket.create_connection(("127.0.0.1", served.port), 10.0)


def is_answered(sock: socket.socket) -> bool:
    sock.sendall(get("/live"))
    return sock.recv(4096).startswith(b"HTTP/1.1 200")


def settled_files(served: ServedProcess, most: int) -> int:
    """The number of open files once connections have ended, or after five seconds."""
    until = time.monotonic() + 5
    while (found := served.process.num_fds()) > most and time.monotonic() < until:
        time.sleep(0.05)  # another process closes the files
    return found
