"""One helper process, as its parent sees it."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

from sagellm.runtime.models.sandbox.limits import OUT_OF_MEMORY
from sagellm.runtime.models.sandbox.messages import Frames, Ready, Reply, Setup, frame

_ROOT = str(Path(__file__).parents[4])
_CHUNK_BYTES = 1 << 16
_SEND_S = 60.0
_ENV = {  # one thread, one heap: what the memory limit counts is then what the work takes
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}


class HelperDied(Exception):
    """The process ended with this exit code, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    @property
    def is_out_of_time(self) -> bool:
        return self.code == -signal.SIGPROF

    @property
    def is_out_of_memory(self) -> bool:
        """A failed allocation outside of Python aborts."""
        return self.code in (OUT_OF_MEMORY, -signal.SIGABRT)


class Helper:
    """A Python process that runs `module`, at the other end of a socket.

    It ends when the socket is closed, hence with this process, whichever way that ends: an idle
    helper at once, one at work within its limit of CPU time.
    """

    def __init__(self, module: str, setup: Setup) -> None:
        """Raises OSError."""
        self._socket, theirs = socket.socketpair()
        self._frames: Frames[Reply] = Frames(Reply)
        self.ready: Ready | None = None
        try:
            self._process = subprocess.Popen(
                # -P: no module is taken from the current folder, which may be that of a model.
                [sys.executable, "-P", "-m", module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, **_ENV, "PYTHONPATH": _python_path()},
                start_new_session=True,  # a Ctrl-C at the terminal is for the parent
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._send(frame(setup))

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_readable(self, timeout_s: float) -> bool:
        """Wait for bytes or the end; blocks, for whole milliseconds."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def become_ready(self) -> Generator["Helper", None, Ready]:
        """Wait for the job to be set up; see `exchange`."""
        if self.ready is None:
            reply = yield from self._reply()
            assert isinstance(reply, Ready)
            self.ready = reply
        return self.ready

    def exchange(self, data: bytes) -> Generator["Helper", None, Reply]:
        """Send a frame and wait for the answer. Yields whenever the caller should wait until this
        is readable. Raises HelperDied, and TimeoutError where the helper does not read.
        """
        self._send(data)
        return (yield from self._reply())

    def end(self) -> int:
        """Kill the process, and forget it. The exit code is its own where it had ended before."""
        self._socket.close()
        self._process.kill()
        return self._process.wait()

    def _send(self, data: bytes) -> None:
        """What is not taken is noticed by the missing answer."""
        self._socket.settimeout(_SEND_S)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)
        self._socket.setblocking(False)

    def _reply(self) -> Generator["Helper", None, Reply]:
        while True:
            yield self
            data = self._received()
            if data is None:
                continue
            if not data:
                raise HelperDied(self.end())
            reply = self._frames.feed(data)
            if reply is not None:
                return reply

    def _received(self) -> bytes | None:
        """None where nothing is there yet; empty at the end."""
        try:
            return self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""


def _python_path() -> str:
    """Where this package is found, also if it is not installed."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([given, _ROOT] if given else [_ROOT])
