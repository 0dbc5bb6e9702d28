"""Embedding through a session: texts are read and sent in parts, and vectors become numbers."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sagellm.graphs.vocabulary import EMBED
from sagellm.runtime.messages import Request
from sagellm.session.models import Models
from sagellm.session.requests import (
    Prompt,
    RequestError,
    RequestFailed,
    Timing,
    raise_unserved,
    read_fields,
)
from sagellm.session.stream import Output, Stream

_MOST_TEXTS = 512  # of one request of the graph, so that a long list does not fill its queues


class TextSession(Protocol):
    """The parts of a session that embedding needs."""

    @property
    def models(self) -> Models: ...

    def start(self, request: Request, timing: Timing) -> Stream: ...

    def is_able(self, capability: str, model: str = "") -> bool: ...

    def free_id(self) -> str: ...


async def embed_texts(
    session: TextSession,
    texts: Sequence[Prompt],
    dimensions: int | None,
    fields: Mapping[str, Any],
) -> list[list[float]]:
    """Return the vector of each text, in order. Raises as `Session.embed` does."""
    known, timing = read_fields(fields)
    model = session.models.named(known.get("model", ""))
    if not session.is_able(EMBED, model.key):
        raise RequestError(f"the model {model.root} generates: texts go to an operator `embed`")
    if isinstance(texts, str):
        raise RequestError("texts is one text; give a list of texts")
    vectors: list[list[float]] = []
    for first in range(0, len(texts), _MOST_TEXTS):
        part = tuple(model.read(text).token_ids for text in texts[first : first + _MOST_TEXTS])
        request = Request(
            **{"request_id": session.free_id(), **known}, texts=part, dimensions=dimensions
        )
        vectors += await _vectors(session.start(request, timing), len(part))
    return vectors


async def _vectors(stream: Stream, number: int) -> list[list[float]]:
    found: dict[int, list[float]] = {}
    async with stream:
        while outputs := await stream.take_ended():
            for item in outputs:
                found[item.choice] = floats_of(_served(item, stream).vector)
    return [found[choice] for choice in range(number)]


def _served(end: Output, stream: Stream) -> Output:
    """The event of a text that was embedded. Raises RequestRefused and RequestFailed."""
    raise_unserved(end, stream.cause_of(end.choice))
    if not end.vector:
        raise RequestFailed(end)
    return end


def floats_of(vector: bytes) -> list[float]:
    """Return the numbers of a vector, which events carry as float32, little-endian."""
    return [*struct.unpack(f"<{len(vector) // 4}f", vector)]
