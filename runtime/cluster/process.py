"""One process of ours: started so that it cannot outlive us, and whose end is noticed at once."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio


class Process:
    """A Python process that runs `module`, with a pipe as standard input, on which at most its part
    is written: it ends when we do, whichever way, and the process with it (see `lifeline`).

    Its end is a readable descriptor (pidfd), so that it is noticed within milliseconds. It is given
    the `files`, descriptors of ours, under their numbers.
    """

    def __init__(self, module: str, env: Mapping[str, str], files: Sequence[int] = ()) -> None:
        """Raises OSError."""
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_descriptor() else None,
            env={**os.environ, **env},
            pass_fds=files,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to handle
        )
        self._end = os.pidfd_open(self._popen.pid)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def cpu_s(self) -> float:
        """What it has computed so far, as far as the system tells; 0 once it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system

    async def wait(self) -> int:
        """The exit code, negative for a signal, once it has ended."""
        while self._popen.poll() is None:
            await trio.lowlevel.wait_readable(self._end)
        await trio.lowlevel.checkpoint()
        return self._popen.returncode

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def tell(self, line: bytes) -> None:
        """Write to its standard input: its part, where it waits for one. Raises OSError."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line)
        self._popen.stdin.flush()

    def kill(self) -> None:
        """End it at once, stopped or not; nothing happens where it has ended."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._end, signal.SIGKILL)

    def close(self) -> None:
        """Forget a process that has ended, and close what is open to it."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        os.close(self._end)


def _has_descriptor() -> bool:
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
