"""POST /invocations: what SageMaker calls, whatever the body asks for."""

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.endpoints.chat import chat
from sagellm.gateway.endpoints.completions import completions
from sagellm.gateway.failure import ApiError
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.protocol.json import read_json


async def invocations(gateway: Gateway, request: Request) -> Response:
    """A chat where the body has `messages`, a completion where it has a `prompt`."""
    with gateway.budgets.hold(request.state.call.tenant):
        body = read_json(await request.body(), max_depth=gateway.settings.limits.json_depth)
    if isinstance(body, dict) and body.get("messages") is not None:
        return await chat(gateway, request)
    if isinstance(body, dict) and body.get("prompt") is not None:
        return await completions(gateway, request)
    raise ApiError(400, "the body has neither `messages` (a chat) nor a `prompt`")
