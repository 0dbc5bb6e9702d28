"""The form of errors and the names of headers that the clients of each API expect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from sagellm.gateway.answers.anthropic_objects import AnthropicFailure, anthropic_error
from sagellm.gateway.api_errors import ApiError

ErrorBody: TypeAlias = Callable[[ApiError, str], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDialect:
    """One API, as seen from outside its endpoints.

    `error_body` returns the JSON text of an error, given the id of the call. `key_header`: a header
    that may hold the key, besides Authorization; b"" for none. `id_headers`: headers of answers
    that repeat the id of the call, besides x-request-id.
    """

    error_body: ErrorBody
    key_header: bytes = b""
    id_headers: tuple[bytes, ...] = ()


def _openai_error(error: ApiError, request_id: str) -> bytes:
    return error.encoded


def _anthropic_error(error: ApiError, request_id: str) -> bytes:
    return msgspec.json.encode(AnthropicFailure(anthropic_error(error), request_id))


OPENAI = ApiDialect(error_body=_openai_error)
ANTHROPIC = ApiDialect(
    error_body=_anthropic_error, key_header=b"x-api-key", id_headers=(b"request-id",)
)
