"""Headers that no client needs to send: too many, too large, or read differently by two readers."""

from starlette.types import Scope

from sagellm.gateway.failure import ApiError
from sagellm.gateway.settings import Limits

_OVERHEAD = 4  # ": " and the end of the line
_VERSIONS = ("1.0", "1.1", "2")
_FRAMING = (b"host", b"content-length", b"transfer-encoding")


def check_headers(scope: Scope, limits: Limits) -> None:
    """Raises ApiError 431 for size, 400 for framing that leaves room for request smuggling
    (RFC 9112, 3.2 and 6.3): servers differ in which of these they let pass.
    """
    headers = scope["headers"]
    if scope["http_version"] not in _VERSIONS:
        raise ApiError(400, "HTTP/1.1 and HTTP/2 are spoken here")
    if len(headers) > limits.num_headers:
        raise ApiError(431, f"more than {limits.num_headers} headers")
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        size += len(name) + len(value) + _OVERHEAD
        if name in _FRAMING:
            found.setdefault(name, []).append(value)
    if size > limits.header_bytes:
        raise ApiError(431, f"the headers are larger than {limits.header_bytes} bytes")
    _check_framing(found)


def _check_framing(found: dict[bytes, list[bytes]]) -> None:
    hosts = found.get(b"host", [])
    if len(hosts) != 1 or not hosts[0]:
        raise ApiError(400, "a request needs exactly one Host header")
    lengths, encodings = found.get(b"content-length"), found.get(b"transfer-encoding")
    if lengths and encodings:
        raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other")
    if lengths and (len(lengths) > 1 or not lengths[0].isdigit()):
        raise ApiError(400, "Content-Length must be one number")
    if encodings and [one.lower() for one in encodings] != [b"chunked"]:
        raise ApiError(400, "the only Transfer-Encoding is chunked")
