"""GET /v1/models, /v1/models/{id}: the names that are served, which are the only ones known."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.structs import Model, Models
from sagellm.gateway.cards import ModelCard
from sagellm.gateway.failure import ApiError
from sagellm.gateway.gateway import Gateway, Served
from sagellm.graphs.vocabulary import nearest


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
