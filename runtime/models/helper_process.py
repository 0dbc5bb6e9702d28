"""Helper processes: their messages (frames of MessagePack on a socket), and `Helper`, the parent's
handle of one.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
_LENGTH_BYTES = 4  # each frame begins with its length, little-endian


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
    """The first frame. The setup of the job may take `memory_bytes` more than the bare interpreter,
    and `cpu_s` seconds of CPU time.
    """

    job: HelperJob
    memory_bytes: int
    cpu_s: float


class RenderWork(msgspec.Struct, frozen=True, tag=True):
    """A conversation to render. `given` is JSON, which keeps large integers and lone surrogates."""

    given: bytes


class EncodeWork(msgspec.Struct, frozen=True, tag=True):
    """Texts to encode."""

    texts: tuple[str, ...]
    add_special_tokens: bool = True


class WorkRequest(msgspec.Struct, frozen=True):
    """One piece of work, with its limits. The work may take `memory_bytes` more than the process
    has after the setup of the job. An answer of more than `max_answer_bytes` is not sent.
    """

    work: RenderWork | EncodeWork
    cpu_s: float
    memory_bytes: int
    max_answer_bytes: int


class HelperReady(msgspec.Struct, frozen=True, tag=True):
    """The setup of the job has ended. If it failed, `fault` is the reason. `variables`: the names
    that a template reads.
    """

    variables: tuple[str, ...] = ()
    fault: str = ""


class RenderedText(msgspec.Struct, frozen=True, tag=True):
    """The prompt of a conversation."""

    text: str


class EncodedTokens(msgspec.Struct, frozen=True, tag=True):
    """The token ids of each text."""

    token_ids: tuple[tuple[int, ...], ...]


class WorkRefused(msgspec.Struct, frozen=True, tag=True):
    """The template or the tokenizer raised an error."""

    cause: str


class AnswerTooLong(msgspec.Struct, frozen=True, tag=True):
    """The answer had more than `max_answer_bytes`, and is not sent."""


HelperReply: TypeAlias = HelperReady | RenderedText | EncodedTokens | WorkRefused | AnswerTooLong


class JobWorker(Protocol):
    """Does the work of one job in a helper process. A module for helper processes has a function
    `open_job`, which makes a JobWorker for a HelperJob, and NEEDS, the names of further modules.
    """

    @property
    def variables(self) -> tuple[str, ...]:
        """The names that a template reads; empty for a tokenizer."""
        ...

    def answer(self, work: RenderWork | EncodeWork) -> HelperReply:
        """Do one piece of work. The parent gets any exception as a WorkRefused."""
        ...


def encode_frame(message: msgspec.Struct) -> bytes:
    """The frame of a message. Raises UnicodeEncodeError for a lone surrogate."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class FrameDecoder(Generic[T]):
    """Assembles messages from received bytes. At most one message is pending, because each message
    is answered before the next.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._received = bytearray()

    def feed(self, data: bytes) -> T | None:
        """Add bytes. Returns the message if it is complete; None: more bytes are needed."""
        self._received += data
        length = int.from_bytes(self._received[:_LENGTH_BYTES], "little")
        if len(self._received) < _LENGTH_BYTES + length or len(self._received) < _LENGTH_BYTES:
            return None
        message = self._decoder.decode(memoryview(self._received)[_LENGTH_BYTES:])
        self._received = bytearray()
        return message


OUT_OF_MEMORY = 77  # exit code
_PACKAGE_ROOT = str(Path(__file__).parents[3])
_MAIN = "sagellm.runtime.models.helper_main"
_CHUNK_BYTES = 1 << 16
_SEND_S = 60.0  # a helper that does not read a frame within this time counts as stuck
_ENV = {  # one thread and one heap: the memory limit then counts what the work takes
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}


class HelperDied(Exception):
    """The helper process has ended. `code`: its exit code, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    @property
    def is_out_of_time(self) -> bool:
        return self.code == -signal.SIGPROF

    @property
    def is_out_of_memory(self) -> bool:
        """Whether memory ran out. A failed allocation outside of Python aborts the process."""
        return self.code in (OUT_OF_MEMORY, -signal.SIGABRT)


class Helper:
    """A Python process that does the work of `module` for this process, over a socket.

    The helper process ends when the socket is closed, and so also when this process ends or is
    killed. An idle helper ends at once, a working helper within its limit of CPU time.
    """

    def __init__(self, module: str, setup: HelperSetup) -> None:
        """Raises OSError."""
        self._socket, theirs = socket.socketpair()
        self._frames: FrameDecoder[HelperReply] = FrameDecoder(HelperReply)
        self.ready: HelperReady | None = None
        try:
            self._process = subprocess.Popen(
                # -P: import no module from the current folder, which may be that of a model.
                [sys.executable, "-P", "-m", _MAIN, module],
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
        """Wait until bytes have arrived or the helper process has ended; False: a timeout. The call
        blocks the thread. The timeout has a resolution of 1 ms.
        """
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
        """Wait until the setup of the job is over. A generator; see `exchange`."""
        if self.ready is None:
            reply = yield from self._reply()
            assert isinstance(reply, HelperReady)
            self.ready = reply
        return self.ready

    def exchange(self, data: bytes) -> Generator["Helper", None, HelperReply]:
        """Send a frame and wait for the answer. A generator, so that blocking and async callers
        share it: it yields the helper whenever the caller must wait until the helper is readable.

        Raises HelperDied, and TimeoutError if the helper does not read.
        """
        self._send(data)
        return (yield from self._reply())

    def end(self) -> int:
        """Kill and reap the process. Returns its exit code; if the process ended before the kill,
        the code of that end.
        """
        self._socket.close()
        self._process.kill()
        return self._process.wait()

    def _send(self, data: bytes) -> None:
        """Send all bytes. If the process has ended, no error is raised here: `_reply` raises it."""
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
        """The received bytes. None: none have arrived yet; empty: the process has ended."""
        try:
            return self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""


def _python_path() -> str:
    """The PYTHONPATH of a helper process. It includes the root of this package, because the package
    may not be installed.
    """
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([given, _PACKAGE_ROOT] if given else [_PACKAGE_ROOT])
