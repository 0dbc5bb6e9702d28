"""GET /docs: every route and every field, in a page that loads nothing."""

import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from gateway_calls import gateway_before, playing
from gateway_served import KEYS, SERVERS, get, serving
from starlette.requests import Request

from sagellm.gateway.http.routes import ROUTES, docs, docs_page
from sagellm.gateway.settings import Settings


@pytest.mark.parametrize("server", SERVERS)
async def test_the_page_names_every_route(server: str) -> None:
    async with serving(server) as served:
        reply = await served.ask(get("/docs"))
    page = reply.body.decode()
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for route in ROUTES:
        assert f"<code>{route.method} {route.path.replace(':path', '')}</code>" in page
    assert "max_completion_tokens" in page
    assert '<html lang="en">' in page


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_a_browser_opens_it_without_a_key(path: str) -> None:
    """It has no way to send one; the banner and a 404 send people there."""
    async with serving("hypercorn", **KEYS) as served:
        assert (await served.ask(get(path))).status == 200
        assert (await served.ask(get("/v1/models"))).status == 401


async def test_it_is_written_once_for_the_same_settings() -> None:
    first, same = (gateway_before(playing(), settings=Settings()) for _ in range(2))
    other = gateway_before(playing(), settings=Settings(api_keys={"a": "k"}))
    request = Request({"type": "http"})
    assert await docs(first, request) is await docs(same, request)
    assert b"Needs an API key" not in (await docs(first, request)).body
    assert b"Needs an API key" in (await docs(other, request)).body


async def test_the_policy_lets_the_own_style_in_and_nothing_else() -> None:
    async with serving("hypercorn") as served:
        reply = await served.ask(get("/docs"))
    page, policy = reply.body.decode(), reply.headers["content-security-policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    allowed = b64encode(sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{allowed}'" in policy
    assert not re.findall(r"<script|<link|<img| style=| on\w+=|https?://", page)


def test_what_a_document_says_is_escaped() -> None:
    document = {
        "info": {"version": "<b>"},
        "paths": {"/<i>": {"get": {"summary": "<s>", "responses": {}}}},
        "components": {"schemas": {"<u>": {"properties": {"<s>": {}}}}, "responses": {}},
    }
    body = bytes(docs_page(document).body).decode()
    HTMLParser().feed(body)
    assert "GET /&lt;i&gt;" in body
    assert not re.search(r"<[busi]>", body)
