import subprocess
import sys

import pytest
from scripted_server import Call, scripted, telling

from sagellm import ClientError, UnifiedInferenceClient
from sagellm.client import server
from sagellm.client.http_calls import (
    configured_key,
    configured_url,
    encode_json,
    is_local,
    is_server,
    read_url,
    request_headers,
    transport_options,
)


@pytest.mark.parametrize("value", [object(), "\ud800", "endless"])
def test_a_call_that_json_cannot_hold_is_refused(value: object) -> None:
    body: dict[str, object] = {"a": value}
    if value == "endless":
        body["a"] = body
    with pytest.raises(ClientError, match="the call is no JSON"):
        encode_json(body)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("http://a:8000/", "http://a:8000"),
        ("http://a:8000/v1", "http://a:8000"),
        ("http://a:8000/v1/", "http://a:8000"),
        ("https://a/llm/v1", "https://a/llm"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
    ],
)
def test_a_url_is_the_root_of_a_server(given: str, read: str) -> None:
    assert read_url(given) == read


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:port", "://"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(ClientError, match="URL"):
        read_url(url)


def test_the_url_given_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SAGELLM_URL", raising=False)
    assert configured_url(None) is None
    monkeypatch.setenv("SAGELLM_URL", "http://of-env/v1")
    assert configured_url(None) == "http://of-env"
    assert configured_url("http://given") == "http://given"


def test_the_key_given_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAGELLM_API_KEY", "of-env")
    assert configured_key(None) == "of-env"
    assert configured_key("given") == "given"
    assert request_headers("given")["Authorization"] == "Bearer given"
    assert "Authorization" not in request_headers(None)


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://localhost", True),
        ("http://[::1]:2", True),
        ("http://10.0.0.1", False),
        ("http://example.org", False),
    ],
)
def test_no_proxy_stands_before_this_machine(url: str, local: bool) -> None:
    assert is_local(url) == local
    assert transport_options(url, None, 60)["trust_env"] == (not local)


@pytest.mark.parametrize(
    ("status", "body", "known"),
    [
        (200, b'{"object": "list", "data": []}', True),
        (401, b'{"error": {"message": "key"}}', True),
        (401, b"<html>", False),
        (200, b"<html>", False),
        (200, b"[]", False),
        (404, b'{"data": []}', False),
    ],
)
def test_a_server_is_known_by_its_models(status: int, body: bytes, known: bool) -> None:
    assert is_server(status, body) == known


def test_the_first_local_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def other(call: Call) -> None:
        await call.whole(b"<html>", 404)

    monkeypatch.delenv("SAGELLM_URL", raising=False)
    with scripted(other) as wrong, scripted(telling("yes")) as right:
        closed = "http://127.0.0.1:9"
        monkeypatch.setattr(server, "LOCAL", (closed, f"{wrong.url}/x", right.url))
        with UnifiedInferenceClient.create() as client:
            assert client.generate("a") == "yes"
        monkeypatch.setattr(server, "LOCAL", (closed,))
        with pytest.raises(ClientError, match="sagellm serve"):
            UnifiedInferenceClient.create()


def test_importing_the_client_loads_no_torch_and_sagellm_no_httpx() -> None:
    code = (
        "import sys, sagellm; print('httpx2' in sys.modules); "
        "sagellm.UnifiedInferenceClient, sagellm.AsyncUnifiedInferenceClient, sagellm.ClientError; "
        "print('httpx2' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "False"]
