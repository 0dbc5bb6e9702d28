"""Whether the gateway lives, is well, and takes work; how much it has; what it is."""

from importlib.metadata import version as installed

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.failure import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.layers.draining import draining

VERSION = installed("sagellm")


async def live(gateway: Gateway, request: Request) -> Response:
    """200 for as long as the process answers at all."""
    return Response()


async def ready(gateway: Gateway, request: Request) -> Response:
    """200 where new requests are taken and tokens have been seen to come; else 503."""
    if gateway.is_draining:
        raise draining()
    return await health(gateway, request)


async def health(gateway: Gateway, request: Request) -> Response:
    """200 where tokens have been seen to come, also while draining; else 503 with the reason."""
    if not gateway.readiness.is_ready:
        reason = gateway.readiness.reason
        raise ApiError(503, f"not ready: {reason}", code="not_ready", retry_after_s=1.0)
    return Response()


async def version(gateway: Gateway, request: Request) -> Response:
    return _json({"version": VERSION})


async def load(gateway: Gateway, request: Request) -> Response:
    """The number of calls under way, which routers balance by: of all gateways at this address."""
    return _json({"server_load": request.state.calls.everywhere.total})


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
