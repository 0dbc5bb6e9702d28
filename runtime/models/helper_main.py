"""The helper's side: sets up one job, and answers one piece of work after the other."""

import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from sagellm.runtime.models.helper import (
    OUT_OF_MEMORY,
    AnswerTooLong,
    EncodeWork,
    FrameDecoder,
    HelperJob,
    HelperReady,
    HelperReply,
    HelperSetup,
    MemoryLimit,
    RenderWork,
    WorkRefused,
    WorkRequest,
    encode_frame,
    limit_cpu,
    limit_files,
)

_LOOK_S = 5  # how often an idle helper makes sure that its parent lives
_CHUNK_BYTES = 1 << 16
_CAUSE_CHARS = 500
T = TypeVar("T")


class JobWorker(Protocol):
    """What does the job."""

    @property
    def variables(self) -> tuple[str, ...]: ...

    def answer(self, work: RenderWork | EncodeWork) -> HelperReply: ...


def serve(open_worker: Callable[[HelperJob], JobWorker]) -> None:
    """Work for the process at the other end of standard input, until that end is closed."""
    link = _ParentSocket(socket.socket(fileno=os.dup(0)))
    setup = link.read(FrameDecoder[HelperSetup](HelperSetup))
    limit_files()
    memory = MemoryLimit()
    memory.allow(setup.memory_bytes)
    _silence()
    with limit_cpu(setup.cpu_s):
        worker, ready = _set_up(open_worker, setup.job)
    memory.rise()
    link.write(encode_frame(ready))
    asks = FrameDecoder[WorkRequest](WorkRequest)
    while True:
        ask = link.read(asks)
        memory.allow(ask.memory_bytes)
        link.write(_answered(worker, ask))


class _ParentSocket:
    """The socket to the parent. The process ends when it closes."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        wait = struct.pack("ll", _LOOK_S, 0)  # a timeval: cheaper than a poll before each read
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        self._parent = os.getppid()

    def read(self, frames: FrameDecoder[T]) -> T:
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                if os.getppid() == self._parent:
                    continue
                data = b""  # a child that the parent forked may hold the other end open
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
    """Stands for a job that could not be set up: refuses all work with the same cause."""

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
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        _end_without_memory(error)
        fault = _cause(error)
        return _BrokenJob(fault), HelperReady(fault=fault)


def _answered(worker: JobWorker, ask: WorkRequest) -> bytes:
    """The frame of the answer. Encoding it is part of the work that is limited."""
    with limit_cpu(ask.cpu_s):
        try:
            answer = encode_frame(worker.answer(ask.work))
        except BaseException as error:  # as above
            _end_without_memory(error)
            answer = encode_frame(WorkRefused(_cause(error)))
        return answer if len(answer) <= ask.max_answer_bytes else encode_frame(AnswerTooLong())


def _end_without_memory(error: BaseException) -> None:
    """End this process if memory ran out: what it still holds would be missing later."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        os._exit(OUT_OF_MEMORY)


def _cause(error: BaseException) -> str:
    """What was raised; of a lone surrogate, only that there is one."""
    if isinstance(error, msgspec.MsgspecError | UnicodeEncodeError):
        return "the result is not Unicode text"
    text = str(error)[:_CAUSE_CHARS] or type(error).__name__
    return text.encode(errors="replace").decode()


def _silence() -> None:
    """From here on the standard error output is for nobody: the log names the cause."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
