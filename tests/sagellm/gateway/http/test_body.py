"""The bodies of all open calls, bounded together, however they come."""

from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.http.checks import OpenBodies, RequestBody
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits(all_bodies_bytes=100)


def body(bodies: OpenBodies, *pieces: int) -> RequestBody:
    """A body without a length, as HTTP/2 and chunked ones are, that comes in pieces."""
    waiting = list(pieces)

    async def receive() -> dict[str, Any]:
        content = b"x" * waiting.pop(0)
        return {"type": "http.request", "body": content, "more_body": bool(waiting)}

    scope = {"headers": [(b"transfer-encoding", b"chunked")], "http_version": "1.1"}
    return RequestBody(scope, receive, LIMITS, 1e12, bodies)


async def test_a_body_without_a_length_is_refused_where_it_becomes_too_much() -> None:
    bodies = OpenBodies(LIMITS)
    first, second = body(bodies, 60), body(bodies, 30, 30, 30)
    await first.receive()
    await second.receive()
    with pytest.raises(ApiError) as refused:
        await second.receive()
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1.0)
    assert bodies.num_bytes == 90
    second.drop()
    second.drop()
    assert bodies.num_bytes == 60
    first.drop()
    assert bodies.num_bytes == 0


async def test_a_body_that_is_alone_may_be_larger_than_the_bound() -> None:
    bodies = OpenBodies(LIMITS)
    large, other = body(bodies, 60, 60, 60), body(bodies, 1)
    for _ in range(3):
        await large.receive()
    with pytest.raises(ApiError):
        await other.receive()
