"""The page at /: its files, their headers, and how it is switched off. `make page` looks at it."""

import re
from typing import Any

import pytest
from gateway_calls import gateway_before, playing
from gateway_served import KEYS, SERVERS, ask, get, null_gateway

from sagellm.gateway.http.app import build_app
from sagellm.gateway.http.routes import HEADERS, MEDIA_TYPES, PAGE_ROUTES, PATHS, page_files
from sagellm.gateway.settings import Settings

FILES = page_files()
TEXTS = {path: file.content.decode() for path, file in FILES.items()}
PAGE_BYTES = 300_000


class Answer:
    """What the app sends to one GET."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        self.body += message.get("body", b"")


async def fetch(path: str, *headers: tuple[bytes, bytes], **settings: Any) -> Answer:
    known = Settings(served_models=("m",), **settings)
    app = build_app(gateway_before(playing(), settings=known))
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"localhost"), *headers],
    }
    answer = Answer()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, answer.send)
    return answer


@pytest.mark.parametrize("path", FILES)
async def test_a_file_comes_with_its_type_and_its_policy(path: str) -> None:
    answer = await fetch(path)
    assert (answer.status, answer.body) == (200, FILES[path].content)
    suffix = ".html" if path == "/" else path[path.rindex(".") :]
    assert answer.headers["content-type"] == MEDIA_TYPES[suffix]
    assert HEADERS.items() <= answer.headers.items()


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy.pop("default-src") == policy.pop("frame-ancestors") == "'none'"
    assert policy.pop("base-uri") == policy.pop("form-action") == "'none'"
    assert set(policy.values()) == {"'self'"}


@pytest.mark.parametrize(
    "inline",
    [r"<script>", r"<style", r"\sstyle=", r"\son\w+=", r"javascript:", r"\b(innerHTML|eval)\b"],
)
def test_nothing_in_the_files_needs_what_the_policy_forbids(inline: str) -> None:
    assert [path for path, text in TEXTS.items() if re.search(inline, text)] == []


def test_the_page_names_its_own_files_alone() -> None:
    """Relative: it works under a prefix of a proxy, too, and without a network."""
    named = set(re.findall(r'(?:src|href)="([^"]+)"', TEXTS["/"]))
    imported = {f"page/{name}" for text in TEXTS.values() for name in IMPORT.findall(text)}
    assert {f"/{name}" for name in named | imported} == FILES.keys() - {"/"}
    elsewhere = {url for text in TEXTS.values() for url in ELSEWHERE.findall(text)}
    assert elsewhere == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches


IMPORT = re.compile(r'from "\./([^"]+)"')
ELSEWHERE = re.compile(r"(?:https?:)?//[\w.-]+\.[\w./-]+")


def test_the_page_is_small() -> None:
    assert sum(len(file.content) for file in FILES.values()) < PAGE_BYTES


async def test_a_browser_that_has_a_file_is_not_sent_it_again() -> None:
    etag = (await fetch("/")).headers["etag"].encode()
    for header in (etag, b"W/" + etag, b'"other", ' + etag):
        answer = await fetch("/", (b"if-none-match", header))
        assert (answer.status, answer.body, answer.headers["etag"].encode()) == (304, b"", etag)
    assert (await fetch("/", (b"if-none-match", b'"other"'))).status == 200


@pytest.mark.parametrize("route", PAGE_ROUTES, ids=lambda route: route.path)
async def test_without_the_page_its_paths_are_as_any_other(route: Any) -> None:
    assert (await fetch(route.path, page=False)).status == 404
    assert (await fetch(route.path, page=False, **KEYS)).status == 401


@pytest.mark.parametrize("path", ["//", "/page", "/page/", "/page/index.html", "/PAGE/page.css"])
async def test_no_other_path_is_open(path: str) -> None:
    assert (await fetch(path, **KEYS)).status == 401


async def test_the_page_is_counted_under_its_own_paths() -> None:
    assert {route.path for route in PAGE_ROUTES} <= set(PATHS)


async def test_a_page_of_elsewhere_gets_nothing_and_ours_is_let_in() -> None:
    assert (await fetch("/v1/models", (b"origin", b"http://localhost"))).status == 200
    assert (await fetch("/v1/models", (b"origin", b"http://evil.example"))).status == 403
    assert "access-control-allow-origin" not in (await fetch("/v1/models")).headers


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_opens_it_to_all_and_answers_head(server: str) -> None:
    """The same bytes, key or none: they say nothing of the server."""
    with null_gateway(server, **KEYS) as port:
        whole = ask(port, get("/"))
        head = ask(port, get("/", "Connection: close").replace(b"GET", b"HEAD"))  # has no body
        known = ask(port, get("/", "Authorization: Bearer user-key"))
        models = ask(port, get("/v1/models"))
    assert (whole.status, head.status, models.status) == (200, 200, 401)
    assert whole.body == known.body == FILES["/"].content
    assert head.body == b""
    for name in ("content-length", "etag", "content-security-policy"):
        assert head.headers[name] == whole.headers[name]


def test_several_gateways_serve_it_or_do_not() -> None:
    with null_gateway("uvicorn", num_gateways=2, page=False) as port:
        assert ask(port, get("/")).status == 404
        assert ask(port, get("/v1/models")).status == 200
