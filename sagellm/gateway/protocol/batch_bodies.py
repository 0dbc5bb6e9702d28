"""The request body that creates a batch, and the query of lists of files and batches."""

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from sagellm.gateway.api_errors import wrong
from sagellm.gateway.protocol.bodies import convert
from sagellm.gateway.protocol.json import fields_of, read_json, shown
from sagellm.gateway.protocol.other_apis import Foreign
from sagellm.gateway.protocol.request import at_most
from sagellm.gateway.settings import RequestLimits
from sagellm.graphs.vocabulary import nearest

MAX_METADATA, MAX_LABEL_LEN, MAX_VALUE_LEN = 16, 64, 512
LIFE_S = (3600, 30 * 86_400)  # of a file with an expiry
MAX_ID_LEN = 64
_NONE = Foreign(unbuilt={}, taken={})


class OutputLife(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The life of the result files of a batch, in seconds from their creation."""

    anchor: str
    seconds: Annotated[int, Meta(ge=LIFE_S[0], le=LIFE_S[1])]


class BatchCreation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a new batch. `completion_window` must be "24h"."""

    input_file_id: Annotated[str, Meta(max_length=MAX_ID_LEN)]
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputLife | None = None


def read_batch(body: bytes, limits: RequestLimits, endpoints: Sequence[str]) -> BatchCreation:
    """Read the body of a new batch. `endpoints`: those that a batch may name. Raises ApiError."""
    value = read_json(body, max_depth=limits.json_depth)
    said = fields_of(value, BatchCreation.__struct_fields__, _NONE)
    if "output_expires_after" in said:
        names = OutputLife.__struct_fields__
        life = fields_of(said["output_expires_after"], names, _NONE, "output_expires_after")
        said["output_expires_after"] = life
    request = convert(said, BatchCreation)
    if request.endpoint not in endpoints:
        raise wrong("endpoint", f"is not served; it must be one of {', '.join(endpoints)}")
    if request.completion_window != "24h":
        raise wrong("completion_window", "must be 24h")
    _check_metadata(request.metadata or {})
    after = request.output_expires_after
    if after is not None and after.anchor != "created_at":
        raise wrong("output_expires_after.anchor", "must be created_at")
    return request


def _check_metadata(metadata: Mapping[str, str]) -> None:
    at_most("metadata", len(metadata), MAX_METADATA, "entries")
    for name, value in metadata.items():
        at_most("metadata", len(name), MAX_LABEL_LEN, "characters in one name")
        at_most("metadata", len(value), MAX_VALUE_LEN, "characters in one value")


class PageQuery(NamedTuple):
    """The part of a list that a client wants. `after`: the id before the first one, or ""."""

    limit: int
    after: str = ""
    is_newest_first: bool = True
    purpose: str | None = None


def read_page(
    query: Sequence[tuple[str, str]], *, known: tuple[str, ...], default: int, most: int
) -> PageQuery:
    """Read the query of a list. `known`: the names that it may have. Raises ApiError (400)."""
    said: dict[str, str] = {}
    for name, value in query:
        if name not in known:
            close = nearest(name, known) if len(name) <= MAX_ID_LEN else None
            hint = f"; did you mean `{close}`?" if close else ""
            raise wrong("query", f"unknown name {shown(name)}{hint}", "unknown_parameter")
        if name in said:
            raise wrong(name, "is given twice")
        said[name] = value
    order = said.get("order", "desc")
    if order not in ("asc", "desc"):
        raise wrong("order", "must be asc or desc")
    limit = _limit(said.get("limit"), default, most)
    return PageQuery(limit, said.get("after", ""), order == "desc", said.get("purpose"))


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 8 and 1 <= int(text) <= most):
        raise wrong("limit", f"must be a whole number from 1 to {most}")
    return int(text)
