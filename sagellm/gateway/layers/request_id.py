"""The facts of a call: made where it enters, echoed where it leaves."""

import anyio
from starlette.types import Scope

from sagellm.gateway.call import Call, read_request_id, read_traceparent


def new_call(scope: Scope) -> Call:
    """A call whose caller is not known yet; its id is fit for headers and logs."""
    headers = scope["headers"]
    return Call(
        request_id=read_request_id(headers),
        started_s=anyio.current_time(),
        traceparent=read_traceparent(headers),
    )


def echo(call: Call) -> list[tuple[bytes, bytes]]:
    """The headers that every answer has."""
    processing_ms = round((anyio.current_time() - call.started_s) * 1000)
    return [
        (b"x-request-id", call.request_id.encode()),
        (b"openai-processing-ms", b"%d" % processing_ms),
    ]
