"""GET /v1/models, /v1/models/{id}: the names that are served, which are the only ones known."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.answers.structs import Model, Models
from sagellm.gateway.failure import ApiError
from sagellm.gateway.gateway import Gateway


def check_model(gateway: Gateway, name: str | None) -> None:
    """Raise ApiError 404 for a model that is not served; unsaid, it is the one that is."""
    if name is not None and name not in gateway.model.names:
        raise _unknown()


async def models(gateway: Gateway, request: Request) -> Response:
    listed = Models(data=[_model(gateway, name) for name in gateway.model.names])
    return json_response(listed)


async def model(gateway: Gateway, request: Request) -> Response:
    name = request.path_params["id"]
    if name not in gateway.model.names:
        raise _unknown()
    return json_response(_model(gateway, name))


def json_response(content: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


def _model(gateway: Gateway, name: str) -> Model:
    card = gateway.model
    return Model(id=name, created=card.created, root=card.root, max_model_len=card.max_model_len)


def _unknown() -> ApiError:
    message = "the model does not exist; GET /v1/models lists those that are served"
    return ApiError(404, message, param="model", code="model_not_found")
