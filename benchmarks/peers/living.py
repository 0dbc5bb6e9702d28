"""A peer's process: called over stdin, stopped between calls, measured from outside."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

IDLE_S = 0.3
END_S = 10.0


class PeerError(RuntimeError):
    """A peer died, was too slow, or answered an error. The message says why."""


class LivingPeer:
    """One driver in its own process group. Close it, or use it in a `with` block."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.started_s = time.perf_counter()
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(env),
                start_new_session=True,
            )
        self._read = b""

    def __enter__(self) -> "LivingPeer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, kind: str, *, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer; the peer runs only meanwhile. Raises PeerError."""
        self._signal(signal.SIGCONT)
        try:
            self._write({"do": kind, **fields})
            line = self._line(timeout_s)
        finally:
            self._stop()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"answered {line[:80]!r}, which is no JSON") from None
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def idle_share(self) -> float:
        """CPU seconds a second of a process that is neither called nor stopped."""
        self._signal(signal.SIGCONT)
        before = self._cpu_s()
        time.sleep(IDLE_S)
        spent_s = self._cpu_s() - before
        self._stop()
        return spent_s / IDLE_S

    def peak_bytes(self) -> int:
        """The sum of the largest resident sets of its processes."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peaks = [line for line in status.splitlines() if line.startswith("VmHWM")]
                total += sum(int(line.split()[1]) * 1024 for line in peaks)
        return total

    def close(self) -> None:
        """Kill the process and all its descendants."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._signal(signal.SIGKILL)
        self._process.wait(END_S)

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise PeerError("was ended before")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._why()) from None

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise PeerError(f"no answer in {timeout_s:.0f} s")
            part = os.read(descriptor, 1 << 20)
            if not part:
                raise PeerError(self._why())
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _why(self) -> str:
        """The reason why the process ended, in one line."""
        code = self._process.wait(END_S)
        lines = [
            line for line in self._log.read_text(errors="replace").splitlines() if line.strip()
        ]
        if code < 0:
            return f"died of {signal.Signals(-code).name} ({signal.strsignal(-code)})"
        return f"ended with code {code}: {lines[-1] if lines else 'nothing said'}"

    def _stop(self) -> None:
        """Stop the process. All its threads are stopped, or have ended, on return."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):  # the process was waited for: it has ended
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def _cpu_s(self) -> float:
        spent_s = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent_s += times.user + times.system
        return spent_s
