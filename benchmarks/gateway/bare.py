"""The bare server: Starlette with one route and constant chunks; no limits, keys or engine.

    python -m benchmarks.gateway.bare SERVER PORT NUM_CHUNKS PACE_S

A chunk, or a whole answer, takes PACE_S seconds; 0 means without a wait.
"""

import sys
from collections.abc import AsyncIterator

import anyio
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
    b'"created":1795000000,"model":"null","choices":[{"index":0,"text":"x","logprobs":null,'
    b'"finish_reason":null,"stop_reason":null}]}\n\n'
)
ANSWER = {"id": "cmpl-0", "object": "text_completion", "choices": [{"index": 0, "text": "x"}]}


def app(num_chunks: int, pace_s: float) -> Starlette:
    """An application that answers like the gateway: a stream if requested, else JSON."""

    async def stream() -> AsyncIterator[bytes]:
        for _ in range(num_chunks):
            await anyio.sleep(pace_s)  # each chunk is an event of its own, as from an engine
            yield CHUNK
        yield b"data: [DONE]\n\n"

    async def completions(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        await anyio.sleep(pace_s)
        return JSONResponse(ANSWER)

    async def ready(request: Request) -> Response:
        return Response()

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/ready", ready),
        ]
    )


def main() -> None:
    server, port = sys.argv[1], int(sys.argv[2])
    answering = app(num_chunks=int(sys.argv[3]), pace_s=float(sys.argv[4]))
    if server == "uvicorn":
        import uvicorn

        uvicorn.run(answering, port=port, loop="uvloop", http="httptools", log_level="error")
        return
    from hypercorn.config import Config
    from hypercorn.trio import serve

    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    trio.run(serve, answering, config)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
