"""What a helper process is told, and what it answers: frames of MessagePack on a socket."""

from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")
_LENGTH_BYTES = 4  # before each frame, little-endian


class Template(msgspec.Struct, frozen=True, tag=True):
    """A chat template to render."""

    text: str
    special_tokens: dict[str, str]


class TokenizerFile(msgspec.Struct, frozen=True, tag=True):
    """A tokenizer.json to encode with, and the fields that choose its pipeline."""

    path: str
    model_config: dict[str, Any]
    tokenizer_config: dict[str, Any]


Job: TypeAlias = Template | TokenizerFile


class Setup(msgspec.Struct, frozen=True):
    """The first frame. Setting up the job may take `memory_bytes` beyond the bare interpreter."""

    job: Job
    memory_bytes: int
    cpu_s: float


class Render(msgspec.Struct, frozen=True, tag=True):
    """A conversation. `given` is JSON: it carries integers of any size, and lone surrogates."""

    given: bytes


class Encode(msgspec.Struct, frozen=True, tag=True):
    texts: tuple[str, ...]
    add_special_tokens: bool = True


class Ask(msgspec.Struct, frozen=True):
    """One piece of work. It may take `memory_bytes` beyond what the job took to set up. An answer
    of more than `max_answer_bytes` is refused.
    """

    work: Render | Encode
    cpu_s: float
    memory_bytes: int
    max_answer_bytes: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The job is set up, or `fault` says why it cannot be. `variables` are the names that a
    template reads.
    """

    variables: tuple[str, ...] = ()
    fault: str = ""


class Text(msgspec.Struct, frozen=True, tag=True):
    text: str


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Token ids of each text."""

    token_ids: tuple[tuple[int, ...], ...]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template or the tokenizer raised an error."""

    cause: str


class TooLong(msgspec.Struct, frozen=True, tag=True):
    """The answer has more than `max_answer_bytes`."""


Reply: TypeAlias = Ready | Text | Tokens | Refused | TooLong


def frame(message: msgspec.Struct) -> bytes:
    """A message as it is sent. Raises UnicodeEncodeError for a lone surrogate."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


class Frames(Generic[T]):
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
