"""A served graph in a process of its own: for what fuzzing, load and faults must not take down."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil

NULL = Path(__file__).parents[1] / "benchmarks" / "gateway" / "null.yaml"
START_S = 60.0
STOP_S = 30.0


@dataclass
class ServedProcess:
    """One gateway; `process` is its only process."""

    port: int
    process: psutil.Process
    headers: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    @property
    def num_sockets(self) -> int:
        """Connections that it has, its listener left out."""
        found = self.process.net_connections("tcp")
        return sum(one.status != psutil.CONN_LISTEN for one in found)

    def get(self, path: str, timeout_s: float = 10.0) -> bytes:
        request = urllib.request.Request(self.url + path, headers=dict(self.headers))
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())

    def complete(self, **body: Any) -> Any:
        """A short completion: the canary."""
        asked = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True, **body}
        content = json.dumps(asked).encode()
        headers = {**self.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", content, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def metrics(self) -> dict[str, float]:
        return read_metrics(self.get("/metrics").decode())


def read_metrics(text: str) -> dict[str, float]:
    """Each sample by its name; by name and labels too, as they are written."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            labelled, _, value = line.rpartition(" ")
            found[labelled] = float(value)
            name = labelled.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value) if name != labelled else float(value)
    return found


@contextmanager
def served_process(
    *options: str, graph: Path | str = NULL, key: str = "", ends_killed: bool = False, **popen: Any
) -> Iterator[ServedProcess]:
    """`sagellm serve` until the block ends; it must have survived that, and end with 0.

    `ends_killed`: it is killed by the block or at its end, and that is no fault.
    """
    command = [sys.executable, "-m", "sagellm", "serve", str(graph), "--port", "0"]
    command += ["--log-level", "error", *(("--api-key", key) if key else ())]
    executor = os.environ.get("SAGELLM_TEST_EXECUTOR")  # see conftest
    if executor is not None and "--executor" not in options:
        command += ["--executor", executor]
    gateways = os.environ.get("SAGELLM_TEST_GATEWAYS")
    if gateways is not None and "--gateways" not in options:
        command += ["--gateways", gateways]
    command += options
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, **popen)
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            served = ServedProcess(0, psutil.Process(process.pid), headers)
            if not _becomes_ready(served, process):
                raise RuntimeError(f"no gateway answers: {_tail(log)!r}")
            yield served
            if ends_killed:
                return
            assert process.poll() is None, _tail(log)
            process.terminate()
            assert process.wait(STOP_S) == 0, _tail(log)
            assert b"Traceback" not in _tail(log), _tail(log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _tail(log: Any) -> bytes:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 8000))
    return bytes(log.read())


def _becomes_ready(served: ServedProcess, process: "subprocess.Popen[bytes]") -> bool:
    """And knows its port, which the system chose: one that was free before may be so no more."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            served.port = served.port or _listening_port(served.process)
            served.get("/ready", 1.0)
            return True
        except (URLError, OSError, psutil.Error):
            time.sleep(0.05)  # nothing tells another process that it is ready
    return False


def _listening_port(process: psutil.Process) -> int:
    """0: it does not listen yet."""
    found = process.net_connections("tcp")
    return next((int(one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN), 0)
