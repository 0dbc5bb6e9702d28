"""POST /v1/sagellm/requests/{id}/cancel and GET /v1/sagellm/graph: for whoever runs the server."""

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.structs import Cancelled
from sagellm.gateway.endpoints.models import json_response
from sagellm.gateway.failure import ApiError
from sagellm.gateway.gateway import Gateway, plain_id
from sagellm.graphs.text.codec import to_json


async def cancel(gateway: Gateway, request: Request) -> Response:
    """End a call by its x-request-id or the id of its answer; its client is told."""
    named = request.path_params["id"]
    known = [await gateway.door.cancel(request_id) for request_id in gateway.requests_of(named)]
    if not any(known) and not await gateway.door.cancel_elsewhere(plain_id(named)):
        raise ApiError(404, "no such request is under way", param="id", code="request_not_found")
    return json_response(Cancelled(id=named, cancelled=True))


async def graph(gateway: Gateway, request: Request) -> Response:
    """The graph that is open, as JSON."""
    if gateway.graph is None:
        raise ApiError(404, "this gateway serves no graph of its own")
    return Response(to_json(gateway.graph), media_type="application/json")
