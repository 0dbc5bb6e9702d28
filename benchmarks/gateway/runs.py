"""One run of one server: start, warm up, load by a client, stop; and its CPU time."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from socket import create_server
from statistics import median
from typing import Any
from urllib.error import URLError

import psutil

CHUNKS = 64
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """A kind of request: a stream, or a short answer as a whole."""

    name: str
    stream: bool
    temperature: float = 1.0

    @property
    def body(self) -> str:
        fields: dict[str, Any] = {"model": "null", "prompt": [1, 2, 3], "ignore_eos": True}
        fields |= {"max_tokens": CHUNKS if self.stream else 1, "stream": self.stream}
        return json.dumps({**fields, "temperature": self.temperature})


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run: CPU of the server's processes, and the clients' latencies."""

    cpu_us_per_request: float
    cpu_us_per_event: float | None
    requests_per_s: float
    events_per_s: float | None
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Events a second for streams, else answers a second."""
        return self.events_per_s or self.requests_per_s


def run_once(
    command: Callable[[int], Sequence[str]],
    load: Load,
    connections: int,
    seconds: float,
    ready: str = "/ready",
) -> Figures:
    """Start a server, warm it up, load it, stop it. `command` returns the command for a port."""
    with served(command, ready) as (process, port):
        _load(port, connections, 1.0, load)
        before = _cpu_s(process)
        counts = _load(port, connections, seconds, load)
        cpu_us = 1e6 * (_cpu_s(process) - before)
    if counts["failed"]:
        raise RuntimeError(f"{counts['failed']} requests failed")
    events = counts["events"] if load.stream else 0
    return Figures(
        cpu_us_per_request=cpu_us / counts["requests"],
        cpu_us_per_event=cpu_us / events if events else None,
        requests_per_s=counts["requests"] / counts["seconds"],
        events_per_s=events / counts["seconds"] if events else None,
        p50_ms=counts["p50_ms"],
        p99_ms=counts["p99_ms"],
    )


@contextmanager
def served(
    command: Callable[[int], Sequence[str]], ready: str = "/ready"
) -> Iterator[tuple[psutil.Process, int]]:
    """Run a server in a process until the block ends."""
    port = _free_port()
    process = subprocess.Popen(command(port))
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}{ready}", process)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()


def _load(port: int, connections: int, seconds: float, load: Load) -> dict[str, Any]:
    arguments = [str(port), str(connections), str(seconds), load.body]
    command = [sys.executable, "-m", "benchmarks.gateway.load", *arguments]
    output = subprocess.check_output(command, timeout=seconds + START_S)
    counts: dict[str, Any] = json.loads(output)
    return counts


def _cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and its living children."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def _free_port() -> int:
    with create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError(f"no server answered at {url}")


def median_of(found: Sequence[Figures]) -> dict[str, Any]:
    """The median of each figure."""
    runs = [asdict(figures) for figures in found]
    return {
        name: None if runs[0][name] is None else round(median(run[name] for run in runs), 2)
        for name in runs[0]
    }
