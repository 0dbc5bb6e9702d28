"""The constant parts of a chunk, encoded once: most chunks differ in nothing but their text."""

import msgspec

from sagellm.gateway.answers.sse import escaped, event

_MARK = "\0"  # stands for the text; no other field of a chunk has one
_ENCODED_MARK = msgspec.json.encode(_MARK)
_encode = msgspec.json.Encoder().encode


class Frame:
    """A chunk with everything in it but its text."""

    MARK = _MARK

    def __init__(self, chunk: msgspec.Struct) -> None:
        """`chunk` has MARK where its text will be."""
        self._head, _, self._tail = event(_encode(chunk)).partition(_ENCODED_MARK)

    def with_text(self, text: str) -> bytes:
        return self._head + escaped(_encode(text)) + self._tail
