"""GET /metrics: the exposition, for Prometheus and whatever scrapes like it."""

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.gateway import Gateway


async def metrics(gateway: Gateway, request: Request) -> Response:
    """Answers in the text format that the Accept header asks for."""
    body, content_type = await gateway.meters.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})
