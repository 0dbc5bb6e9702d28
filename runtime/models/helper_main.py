"""The main module of a helper process: `python -m sagellm.runtime.models.helper_main MODULE`.

A helper process sets its own limits, sets up one job, and then answers one request after another.
"""

import importlib
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from sagellm.runtime.models.helper_process import (
    OUT_OF_MEMORY,
    AnswerTooLong,
    EncodeWork,
    FrameDecoder,
    HelperJob,
    HelperReady,
    HelperReply,
    HelperSetup,
    JobWorker,
    RenderWork,
    WorkRefused,
    WorkRequest,
    encode_frame,
)

_IS_LINUX = sys.platform == "linux"
_MEMORY_CHECK_S = 0.01
_PARENT_CHECK_S = 5  # an idle helper checks at this interval whether its parent is alive
_CHUNK_BYTES = 1 << 16
_CAUSE_CHARS = 500
T = TypeVar("T")


class MemoryLimit:
    """Bounds the memory that this process takes in addition to a baseline, which at first is the
    memory at the start.

    Linux refuses allocations beyond the limit (RLIMIT_AS). macOS has no such limit: there a thread
    checks the memory, and ends the process. The thread runs only when other code releases the GIL.
    """

    def __init__(self) -> None:
        self._baseline_bytes = _taken_bytes()
        self._num_bytes = 0
        if not _IS_LINUX:
            threading.Thread(target=self.watch, name="memory", daemon=True).start()

    def allow(self, num_bytes: int) -> None:
        """Set the limit to `num_bytes` above the baseline."""
        if num_bytes == self._num_bytes:
            return
        self._num_bytes = num_bytes
        if _IS_LINUX:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = self._baseline_bytes + num_bytes
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def reset_baseline(self) -> None:
        """Make the memory that is taken now the baseline. Call `allow` next, to set a limit."""
        self._baseline_bytes = _taken_bytes()
        self._num_bytes = 0

    def watch(self) -> None:
        """End this process when it exceeds the limit. Runs in a thread, for ever."""
        while not self._num_bytes or _taken_bytes() < self._baseline_bytes + self._num_bytes:
            time.sleep(_MEMORY_CHECK_S)
        os._exit(OUT_OF_MEMORY)


def _taken_bytes() -> int:
    """The size of the address space, in bytes; on macOS, the peak of resident memory."""
    if _IS_LINUX:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        return num_pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def limit_files() -> None:
    """Forbid this process to write files and core dumps."""
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


@contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """Kill this process with SIGPROF if the `with` block takes more than `seconds` of CPU time.

    The signal also ends a call into C, and it needs no parent that watches. Time spent waiting for
    a core does not count.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # a parent may have blocked it
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(open_worker: Callable[[HelperJob], JobWorker]) -> None:
    """Run one job for the parent, over the socket at standard input, until the parent closes it."""
    link = _ParentSocket(socket.socket(fileno=os.dup(0)))
    setup = link.read(FrameDecoder[HelperSetup](HelperSetup))
    # Limits come first, because setting up the job already runs code that the model's files define.
    limit_files()
    memory = MemoryLimit()
    memory.allow(setup.memory_bytes)
    _silence()
    with limit_cpu(setup.cpu_s):
        worker, ready = _set_up(open_worker, setup.job)
    memory.reset_baseline()
    link.write(encode_frame(ready))
    asks = FrameDecoder[WorkRequest](WorkRequest)
    while True:
        ask = link.read(asks)
        memory.allow(ask.memory_bytes)
        link.write(_answered(worker, ask))


class _ParentSocket:
    """The socket to the parent. This process ends when the parent closes the socket or ends."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        # A timeval as a socket option is cheaper than a poll before each read.
        wait = struct.pack("ll", _PARENT_CHECK_S, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        self._parent = os.getppid()

    def read(self, frames: FrameDecoder[T]) -> T:
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                if os.getppid() == self._parent:
                    continue
                data = b""  # the parent died, but its forked child may hold the other end open
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            message = frames.feed(data)
            if message is not None:
                return message

    def write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError:
            os._exit(0)


class _BrokenJob:
    """A job whose setup failed. It refuses all work with the same cause."""

    variables = ()

    def __init__(self, fault: str) -> None:
        self._refused = WorkRefused(fault)

    def answer(self, work: RenderWork | EncodeWork) -> HelperReply:
        return self._refused


def _set_up(
    open_worker: Callable[[HelperJob], JobWorker], job: HelperJob
) -> tuple[JobWorker, HelperReady]:
    try:
        worker = open_worker(job)
        return worker, HelperReady(worker.variables)
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        _end_without_memory(error)
        fault = _cause(error)
        return _BrokenJob(fault), HelperReady(fault=fault)


def _answered(worker: JobWorker, ask: WorkRequest) -> bytes:
    """Do one piece of work, and return the frame of the answer. Encoding the frame counts towards
    the limits of the work.
    """
    with limit_cpu(ask.cpu_s):
        try:
            answer = encode_frame(worker.answer(ask.work))
        except BaseException as error:  # see `_set_up`
            _end_without_memory(error)
            answer = encode_frame(WorkRefused(_cause(error)))
        return answer if len(answer) <= ask.max_answer_bytes else encode_frame(AnswerTooLong())


def _end_without_memory(error: BaseException) -> None:
    """End this process if `error` means that memory ran out: the process may still hold the memory,
    which later work would lack.
    """
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        os._exit(OUT_OF_MEMORY)


def _cause(error: BaseException) -> str:
    """The text of an error, shortened. An error about a lone surrogate gets a text of ours, because
    its own text may contain the surrogate.
    """
    if isinstance(error, msgspec.MsgspecError | UnicodeEncodeError):
        return "the result is not Unicode text"
    text = str(error)[:_CAUSE_CHARS] or type(error).__name__
    return text.encode(errors="replace").decode()


def _silence() -> None:
    """Discard standard error from now on. Libraries write to it, and the parent logs the cause of a
    failure anyway.
    """
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


if __name__ == "__main__":
    job_module = importlib.import_module(sys.argv[1])
    for needed in job_module.NEEDS:  # before the limits, which bind imports too
        importlib.import_module(needed)
    serve(job_module.open_job)
