"""HTTPS on both servers, in this process and in processes of gateways."""

import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
from gateway_served import SERVERS, STREAM, get, post, read_reply, serving
from gateway_session import served_session
from tls_pairs import tls_pair

from sagellm.client.responses import ClientError
from sagellm.client.server import AsyncServerConnection

BODY = {"prompt": "hey", "max_tokens": 2}


def _trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


async def _connect(port: int, certificate: Path) -> trio.SSLStream[trio.SocketStream]:
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    stream = trio.SSLStream(
        plain, _trusting(certificate), server_hostname="localhost", https_compatible=True
    )
    await stream.do_handshake()
    return stream


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("num_gateways", [0, 1])
async def test_a_graph_is_served_over_tls(server: str, num_gateways: int, tmp_path: Path) -> None:
    certificate, key = tls_pair(tmp_path)
    fields: dict[str, Any] = {
        "tls_certificate": certificate,
        "tls_key": key,
        "num_gateways": num_gateways,
    }
    async with served_session(server, "joint", {"g.device": "null"}, **fields) as served:
        with trio.fail_after(30):
            stream = await _connect(served.port, certificate)
            for _ in range(2):  # on one connection
                await stream.send_all(post("/v1/completions", BODY))
                reply = await read_reply(stream)
                assert reply.status == 200
                assert json.loads(reply.body)["usage"]["completion_tokens"] == 2
            await stream.aclose()


@pytest.mark.parametrize("server", SERVERS)
async def test_who_speaks_no_tls_is_not_answered(server: str, tmp_path: Path) -> None:
    """And the next client is."""
    certificate, key = tls_pair(tmp_path)
    async with serving(server, tls_certificate=certificate, tls_key=key) as served:
        with trio.fail_after(30):
            async with await served.connect() as plain:
                await plain.send_all(get("/live"))
                assert b"200" not in await plain.receive_some()
            stream = await _connect(served.port, certificate)
            await stream.send_all(get("/live"))
            assert (await read_reply(stream)).status == 200
            await stream.aclose()


@pytest.mark.parametrize("server", SERVERS)
async def test_a_client_that_leaves_over_tls_cancels_its_stream(
    server: str, tmp_path: Path
) -> None:
    certificate, key = tls_pair(tmp_path)
    async with serving(server, tls_certificate=certificate, tls_key=key) as served:
        with trio.fail_after(30):
            stream = await _connect(served.port, certificate)
            await stream.send_all(STREAM)
            assert b"200" in await stream.receive_some()
            await stream.aclose()
            await served.idle()


@pytest.mark.parametrize("is_known", [True, False])
async def test_our_own_client_obeys_the_file_of_authorities(
    is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tls_pair(tmp_path)
    if is_known:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with serving("hypercorn", tls_certificate=certificate, tls_key=key) as served:
        client = AsyncServerConnection(f"https://127.0.0.1:{served.port}", None, 30.0)
        with trio.fail_after(30):
            if is_known:
                assert await client.models()
            else:
                says = "certificate verify failed.*SSL_CERT_FILE"
                with pytest.raises(ClientError, match=says):
                    await client.models()
            await client.aclose()
