"""What the gateway reports: health, load, metrics, models; and the administrator's routes."""

from importlib.metadata import version as installed

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.structs import Cancelled, Model, Models
from sagellm.gateway.cards import ModelCard
from sagellm.gateway.errors import ApiError, draining
from sagellm.gateway.gateway import Gateway, Served, plain_id
from sagellm.graphs.text.codec import to_json
from sagellm.graphs.vocabulary import nearest

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


async def metrics(gateway: Gateway, request: Request) -> Response:
    """Answers in the text format that the Accept header asks for."""
    body, content_type = await gateway.meters.exposition(request.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})


def served_model(gateway: Gateway, name: str | None) -> Served:
    """The model that a request names; unsaid, the first. Raises ApiError 404."""
    if name is None:
        return gateway.models[0]
    found = next((served for served in gateway.models if name in served.card.names), None)
    if found is None:
        raise _unknown(gateway, name)
    return found


async def models(gateway: Gateway, request: Request) -> Response:
    cards = [served.card for served in gateway.models]
    return json_response(Models(data=[_model(card, name) for card in cards for name in card.names]))


async def model(gateway: Gateway, request: Request) -> Response:
    name = request.path_params["id"]
    return json_response(_model(served_model(gateway, name).card, name))


def json_response(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _model(card: ModelCard, name: str) -> Model:
    return Model(id=name, created=card.created, root=card.root, max_model_len=card.max_model_len)


def _unknown(gateway: Gateway, name: str) -> ApiError:
    close = nearest(name, [known for served in gateway.models for known in served.card.names])
    hint = f"did you mean {close}? " if close else ""
    message = f"the model does not exist; {hint}GET /v1/models lists those that are served"
    return ApiError(404, message, param="model", code="model_not_found")


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
