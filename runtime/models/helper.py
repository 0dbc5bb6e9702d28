"""A helper process: its messages, its limits, and its handle in the parent process."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
_LENGTH_BYTES = 4  # before each frame, little-endian


class TemplateJob(msgspec.Struct, frozen=True, tag=True):
    """A chat template to render."""

    text: str
    special_tokens: dict[str, str]


class TokenizerJob(msgspec.Struct, frozen=True, tag=True):
    """A tokenizer.json to encode with, and the fields that choose its pipeline."""

    path: str
    model_config: dict[str, Any]
    tokenizer_config: dict[str, Any]


HelperJob: TypeAlias = TemplateJob | TokenizerJob


class HelperSetup(msgspec.Struct, frozen=True):
    """The first frame. Setting up the job may take `memory_bytes` beyond the bare interpreter."""

    job: HelperJob
    memory_bytes: int
    cpu_s: float


class RenderWork(msgspec.Struct, frozen=True, tag=True):
    """A conversation. `given` is JSON: it carries integers of any size, and lone surrogates."""

    given: bytes


class EncodeWork(msgspec.Struct, frozen=True, tag=True):
    texts: tuple[str, ...]
    add_special_tokens: bool = True


class WorkRequest(msgspec.Struct, frozen=True):
    """One piece of work. It may take `memory_bytes` beyond what the job took to set up. An answer
    of more than `max_answer_bytes` is refused.
    """

    work: RenderWork | EncodeWork
    cpu_s: float
    memory_bytes: int
    max_answer_bytes: int


class HelperReady(msgspec.Struct, frozen=True, tag=True):
    """The job is set up, or `fault` says why it cannot be. `variables` are the names that a
    template reads.
    """

    variables: tuple[str, ...] = ()
    fault: str = ""


class RenderedText(msgspec.Struct, frozen=True, tag=True):
    text: str


class EncodedTokens(msgspec.Struct, frozen=True, tag=True):
    """Token ids of each text."""

    token_ids: tuple[tuple[int, ...], ...]


class WorkRefused(msgspec.Struct, frozen=True, tag=True):
    """The template or the tokenizer raised an error."""

    cause: str


class AnswerTooLong(msgspec.Struct, frozen=True, tag=True):
    """The answer has more than `max_answer_bytes`."""


HelperReply: TypeAlias = HelperReady | RenderedText | EncodedTokens | WorkRefused | AnswerTooLong


def encode_frame(message: msgspec.Struct) -> bytes:
    """A message as it is sent. Raises UnicodeEncodeError for a lone surrogate."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameDecoder(Generic[T]):
    """Puts received bytes together: one message at a time, since each is answered."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._received = bytearray()

    def feed(self, data: bytes) -> T | None:
        """The message that these bytes complete, if they do."""
        self._received += data
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "little")
        if len(self._received) < _LENGTH_BYTES + length or len(self._received) < _LENGTH_BYTES:
            return None
        message = self._decoder.decode(memoryview(self._received)[_LENGTH_BYTES:])
        self._received = bytearray()
        return message


OUT_OF_MEMORY = 77  # exit code
_IS_LINUX = sys.platform == "linux"
_LOOK_S = 0.01


class MemoryLimit:
    """Bounds what this process takes in addition to a level, at first what it has now.

    Linux refuses allocations beyond it (RLIMIT_AS). macOS does not know that limit: there a thread
    ends the process when it sees too much, as soon as the interpreter lets it run.
    """

    def __init__(self) -> None:
        self._level = _taken_bytes()
        self._num_bytes = 0
        if not _IS_LINUX:
            threading.Thread(target=self.watch, name="memory", daemon=True).start()

    def allow(self, num_bytes: int) -> None:
        if num_bytes == self._num_bytes:
            return
        self._num_bytes = num_bytes
        if _IS_LINUX:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = self._level + num_bytes
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def rise(self) -> None:
        """What is taken now is the level from here on."""
        self._level = _taken_bytes()
        self._num_bytes = 0

    def watch(self) -> None:
        while not self._num_bytes or _taken_bytes() < self._level + self._num_bytes:
            time.sleep(_LOOK_S)
        os._exit(OUT_OF_MEMORY)


def _taken_bytes() -> int:
    """Address space; where the system does not say, the peak of what was resident."""
    if _IS_LINUX:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        return num_pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def limit_files() -> None:
    """Write no file, and leave none when killed."""
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


@contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """Within the block, the system kills this process by SIGPROF after so much CPU time.

    It does so inside any call into C, and whether or not somebody is left to watch. Waiting for a
    core does not count.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # a parent may have blocked it
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


_PACKAGE_ROOT = str(Path(__file__).parents[3])
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

    def __init__(self, module: str, setup: HelperSetup) -> None:
        """Raises OSError."""
        self._socket, theirs = socket.socketpair()
        self._frames: FrameDecoder[HelperReply] = FrameDecoder(HelperReply)
        self.ready: HelperReady | None = None
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
        self._send(encode_frame(setup))

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

    def become_ready(self) -> Generator["Helper", None, HelperReady]:
        """Wait for the job to be set up; see `exchange`."""
        if self.ready is None:
            reply = yield from self._reply()
            assert isinstance(reply, HelperReady)
            self.ready = reply
        return self.ready

    def exchange(self, data: bytes) -> Generator["Helper", None, HelperReply]:
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

    def _reply(self) -> Generator["Helper", None, HelperReply]:
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
    return os.pathsep.join([given, _PACKAGE_ROOT] if given else [_PACKAGE_ROOT])
