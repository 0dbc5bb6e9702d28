"""Both servers over real sockets: what passes, what is refused, and what it costs the others."""

from collections.abc import AsyncIterator
from http import HTTPStatus

import anyio.lowlevel
import pytest
import trio
from gateway_served import (
    SERVERS,
    STREAM,
    first_token,
    get,
    post,
    read_reply,
    received,
    serving,
)
from logged import logged
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import EndpointRoute

pytestmark = pytest.mark.parametrize("server", SERVERS)


async def test_an_answer_has_an_id_and_a_json_error_a_fixed_shape(server: str) -> None:
    async with serving(server) as served:
        live = await served.ask(get("/live", "x-request-id: my-id"))
        assert (live.status, live.headers["x-request-id"]) == (200, "my-id")
        wrong = await served.ask(get("/nothing"))
        assert wrong.status == 404
        assert set(wrong.error) == {"message", "type", "param", "code"}
        assert "server" not in wrong.headers


async def test_a_status_line_has_the_standard_phrase(server: str) -> None:
    async with serving(server) as served:
        for raw, status in (
            (get("/live"), 200),
            (get("/nothing"), 404),
            (get("/v1/chat/completions"), 405),
            (get("/live").replace(b"localhost", b"elsewhere.example"), 421),
            (get("/ready").replace(b"GET", b"G\0T"), 400),
        ):
            reply = await served.ask(raw)
            assert (reply.status, reply.reason) == (status, HTTPStatus(status).phrase)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/V1/models", "did you mean /v1/models?"),
        ("/api/chat", "/api/chat is not built; this server has /v1/chat/completions"),
        ("/v1/messages/batches", "did you mean /v1/messages?"),
        ("/api/embed", "/api/embed is not built; this server has /v1/embeddings"),
        ("/zzzz", "there is no such path: /zzzz"),
        ("/<b>`", "/%3Cb%3E%60"),
        ("/" + "x" * 4000, "x" * 100 + "..."),
    ],
)
async def test_a_path_that_is_not_there_is_named(server: str, path: str, named: str) -> None:
    async with serving(server) as served:
        raw = get("/X").replace(b"/X", path.encode())
        reply = await served.ask(raw)
    assert reply.status == 404
    assert named in reply.error["message"].replace("x" * 120, "x" * 100)
    assert len(reply.error["message"]) < 250


async def test_a_method_that_is_not_there_is_told_those_that_are(server: str) -> None:
    async with serving(server) as served:
        reply = await served.ask(get("/v1/chat/completions"))
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["message"] == (
        "/v1/chat/completions does not answer to GET; it answers to POST"
    )


async def test_a_slash_at_the_end_redirects_with_method_and_query(server: str) -> None:
    head = post("/v1/chat/completions/?a=b", {})
    async with serving(server) as served, await served.connect() as stream:
        for _ in range(2):  # the body is read: the connection stays
            await stream.send_all(head)
            reply = await read_reply(stream)
            assert (reply.status, reply.reason) == (307, "Temporary Redirect")
            assert reply.headers["location"] == "/v1/chat/completions?a=b"
        for foreign in (b"//elsewhere.example/", b"/v1//models/", b"/v1/models//"):
            assert (await served.ask(get("/X").replace(b"/X", foreign))).status == 404


async def test_a_stream_is_whole_and_its_connection_lives_on(server: str) -> None:
    async with serving(server) as served, await served.connect() as stream:
        await stream.send_all(STREAM)
        await first_token(stream)
        await served.let_go()
        rest = b""
        while not rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            rest += await received(stream)
        await stream.send_all(get("/live"))
        assert (await read_reply(stream)).status == 200


async def _unread(gateway: Gateway, request: Request) -> Response:
    for _ in range(100):  # until the server has queued all that it will
        await anyio.lowlevel.checkpoint()
    return Response()


async def test_a_body_that_nobody_reads_leaves_nothing_hanging(server: str) -> None:
    """Hypercorn hands the end of an answer out only while its queue of the body has room."""
    head = b"POST /unread HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(server, routes=[EndpointRoute("POST", "/unread", _unread)]) as served:
        for end in (b"0\r\n\r\n", b""):
            assert (await served.ask(head + b"1\r\nx\r\n" * 5000 + end)).status == 200
        await served.idle()


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_large_body_is_refused_while_it_comes(server: str, is_declared: bool) -> None:
    async with serving(server) as served, await served.connect() as stream:
        if is_declared:
            raw = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8388609\r\n\r\n"
            await stream.send_all(raw)
        else:
            await stream.send_all(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_chunks, stream)
                reply = await read_reply(stream)
                nursery.cancel_scope.cancel()
            assert reply.status == 413
            return
        assert (await read_reply(stream)).status == 413


async def _send_chunks(stream: trio.SocketStream) -> None:
    chunk = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
    while True:
        try:
            await stream.send_all(chunk)
        except trio.BrokenResourceError:
            return


async def _faulty(gateway: Gateway, request: Request) -> Response:
    raise RuntimeError("secret at /etc/passwd")


async def _breaking(gateway: Gateway, request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        raise RuntimeError("secret")

    return StreamingResponse(chunks())


async def test_a_fault_is_told_by_its_id_alone(server: str) -> None:
    async with serving(server, routes=[EndpointRoute("GET", "/faulty", _faulty)]) as served:
        with logged() as logs:
            reply = await served.ask(get("/faulty", "x-request-id: abc"))
        assert (reply.status, b"secret" in reply.body) == (500, False)
        assert "abc" in reply.error["message"]
        (failed,) = [entry for entry in logs if entry["event"] == "call_failed"]
        assert failed["request_id"] == "abc"


async def test_an_answer_that_breaks_never_looks_whole(server: str) -> None:
    async with serving(server, routes=[EndpointRoute("GET", "/breaking", _breaking)]) as served:
        reply = await served.ask(get("/breaking"))
        assert (reply.status, reply.body, reply.is_whole) == (200, b"begun", False)
        assert (await served.ask(get("/live"))).status == 200


async def test_a_websocket_is_refused(server: str) -> None:
    async with serving(server) as served:
        upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        reply = await served.ask(get("/v1/sagellm/events", *upgrade, key))
        assert reply.status == 404


async def test_http2_is_not_entered_by_a_header(server: str) -> None:
    async with serving(server) as served:
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAAA")
        assert (await served.ask(get("/live", *upgrade))).status == 200
