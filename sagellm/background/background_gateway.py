"""Gateways in the background: started, found again by their port, asked and ended.

A gateway is a process `sagellm serve` in a session of its own. Its record is a file of this user,
named by the port: how it was started, and the process with the time of its start, so that another
process with the same number is never taken for it.
"""

import fcntl
import os
import signal
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from time import monotonic, sleep
from typing import Literal, TypeAlias

import msgspec
import psutil

from sagellm.background.log_file import NUM_FILES, rotate

GatewayState: TypeAlias = Literal["ready", "not ready", "dead"]

_MODULE = "sagellm.background.serve_main"
_POLL_S = 0.05
_PROBE_S = 2.0
_KILL_S = 5.0  # from the second SIGTERM to SIGKILL


class GatewayRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One background gateway. `args`: those of `sagellm serve`. `created_s`: when its process
    started, in seconds since the epoch. `folder`: its working folder.
    """

    port: int
    host: str
    is_tls: bool
    pid: int
    created_s: float
    args: tuple[str, ...]
    folder: str

    @property
    def reached_host(self) -> str:
        """The host under which this machine reaches the gateway."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        host = self.reached_host
        quoted = f"[{host}]" if ":" in host else host
        return f"{'https' if self.is_tls else 'http'}://{quoted}:{self.port}"

    @property
    def process(self) -> psutil.Process | None:
        """The process of the gateway; None after its end."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            # The kernel counts in ticks of 10 ms.
            is_same = abs(process.create_time() - self.created_s) < 0.02
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def state_folder() -> Path:
    """The folder of the records and log files, which only this user can enter. Raises OSError."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    folder = Path(base) / "sagellm" / "gateways"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def log_path(port: int) -> Path:
    return state_folder() / f"{port}.log"


def records() -> list[GatewayRecord]:
    """The records of all gateways that were started and not stopped, by port."""
    found = [_read(path) for path in state_folder().glob("*.json")]
    return sorted((one for one in found if one is not None), key=lambda one: one.port)


def find(port: int) -> GatewayRecord | None:
    return _read(_record_path(port))


def forget(port: int) -> None:
    _record_path(port).unlink(missing_ok=True)


@contextmanager
def held(port: int) -> Iterator[None]:
    """Keep other commands from starting or stopping a gateway of this port meanwhile."""
    descriptor = os.open(state_folder() / f"{port}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def launch(
    args: Sequence[str], *, host: str, port: int, is_tls: bool, folder: str
) -> GatewayRecord:
    """Start `sagellm serve` with `args` in the background, and write its record. Raises OSError."""
    path = log_path(port)
    if path.exists():
        rotate(path, NUM_FILES)
    to_log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", _MODULE, str(path), folder, *args],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(path), to_log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    record = GatewayRecord(
        port=port,
        host=host,
        is_tls=is_tls,
        pid=pid,
        created_s=psutil.Process(pid).create_time(),
        args=tuple(args),
        folder=folder,
    )
    _write(record)
    return record


def state_of(record: GatewayRecord) -> GatewayState:
    """The state of a gateway, from its process and from `/ready`."""
    if record.process is None:
        return "dead"
    return "ready" if _is_ready(record) else "not ready"


def wait_ready(record: GatewayRecord, timeout_s: float) -> GatewayState:
    """Wait until a gateway is ready or dead, or for `timeout_s`."""
    until_s = monotonic() + timeout_s
    while record.process is not None:
        if _is_ready(record):
            return "ready"
        if monotonic() >= until_s:
            return "not ready"
        sleep(_POLL_S)
    return "dead"


def exit_code(record: GatewayRecord) -> int | None:
    """The exit code of a dead gateway that this process started; None if that is unknown."""
    with suppress(ChildProcessError):
        return os.waitstatus_to_exitcode(os.waitpid(record.pid, 0)[1])
    return None


def end(record: GatewayRecord, timeout_s: float) -> bool:
    """Let a gateway drain and end; return whether it has ended after `timeout_s`."""
    _signal(record, signal.SIGTERM)
    return _has_ended(record, timeout_s)


def kill(record: GatewayRecord) -> bool:
    """End the open streams of a gateway at once, and then the gateway: where it does not end by
    itself, all processes of its session are killed. Return whether it has ended.
    """
    _signal(record, signal.SIGTERM)
    sleep(_POLL_S)
    _signal(record, signal.SIGTERM)  # the second one ends open streams
    if _has_ended(record, _KILL_S):
        return True
    if record.process is not None:
        with suppress(ProcessLookupError):
            os.killpg(record.pid, signal.SIGKILL)
    return _has_ended(record, _KILL_S)


def _signal(record: GatewayRecord, number: int) -> None:
    process = record.process
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _has_ended(record: GatewayRecord, timeout_s: float) -> bool:
    until_s = monotonic() + timeout_s
    while record.process is not None:
        if monotonic() >= until_s:
            return False
        sleep(_POLL_S)
    exit_code(record)  # if this process started it, the kernel keeps it until it is asked
    return True


def _is_ready(record: GatewayRecord) -> bool:
    host = record.reached_host
    if record.is_tls:  # asked from this machine, perhaps by another name than the certificate's
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: HTTPConnection = HTTPSConnection(
            host, record.port, timeout=_PROBE_S, context=context
        )
    else:
        connection = HTTPConnection(host, record.port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/ready")
        with connection.getresponse() as response:
            return response.status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _record_path(port: int) -> Path:
    return state_folder() / f"{port}.json"


def _read(path: Path) -> GatewayRecord | None:
    """The record in a file; None if there is none, or if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=GatewayRecord)
    except (OSError, msgspec.DecodeError):
        return None


def _write(record: GatewayRecord) -> None:
    path = _record_path(record.port)
    fresh = path.with_suffix(".new")
    with open(fresh, "wb", opener=_open_private) as file:
        file.write(msgspec.json.encode(record))
    fresh.replace(path)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # arguments may hold keys
