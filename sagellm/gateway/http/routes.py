"""The route table of the gateway, and its pages for browsers: the chat page and the API docs."""

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b, sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import msgspec
from jinja2 import Environment, Template
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import EndpointRoute
from sagellm.gateway.http.dialects import ANTHROPIC
from sagellm.gateway.http.embeddings import embeddings
from sagellm.gateway.http.endpoints import (
    VERSION,
    cancel,
    chat,
    completions,
    detokenize,
    graph,
    health,
    invocations,
    live,
    load,
    metrics,
    model,
    models,
    ready,
    tokenize,
    tokenizer_info,
    version,
)
from sagellm.gateway.http.stored_endpoints import (
    cancel_batch,
    create_batch,
    create_file,
    delete_file,
    file_content,
    list_batches,
    list_files,
    retrieve_batch,
    retrieve_file,
)
from sagellm.gateway.http.translated_endpoints import (
    count_tokens,
    input_tokens,
    messages,
    responses,
    stored_response,
)
from sagellm.gateway.protocol.openapi import openapi
from sagellm.gateway.settings import RequestLimits, Settings

_KEYS = {"user": "an API key", "admin": "the admin key", "x_api_key": "a key in x-api-key"}


def docs_page(document: dict[str, Any]) -> Response:
    """Return an HTML page that shows an OpenAPI document."""
    template, style = _template(), _text("docs.css")
    body = template.render(
        document=document,
        style=Markup(style),
        keys=_keys,
        names=_names,
        answers=lambda operation: _answers(document, operation),
    )
    headers = {
        "cache-control": "no-store",
        "content-security-policy": (
            f"default-src 'none'; style-src 'sha256-{_hash(style)}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        ),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(body, headers=headers, media_type="text/html")


def _keys(operation: dict[str, Any]) -> str:
    """Return the alternative keys of an operation, as text."""
    return " or ".join(_KEYS[name] for way in operation["security"] for name in way)


def _names(content: dict[str, Any]) -> str:
    """Return the names of the schemas that a body's content refers to, as text."""
    return " or ".join(re.findall(r"#/components/schemas/(\w+)", str(content)))


def _answers(document: dict[str, Any], operation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the status and the description of each answer of an operation."""
    refusals = document["components"]["responses"]
    for status, answer in operation["responses"].items():
        yield status, answer.get("description") or refusals[status]["description"]


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text("docs.html"))


@cache
def _text(name: str) -> str:
    return files("sagellm.gateway").joinpath("reference", name).read_text()


def _hash(style: str) -> str:
    """Return the hash of a style sheet, for the content security policy."""
    return b64encode(sha256(style.encode()).digest()).decode()


INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page shows model output. Even if a script got into the page, it could neither run inline nor
# send data elsewhere: no foreign or inline content, no forms, no framing.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "cache-control": "no-cache",  # browsers revalidate each time, so a new version shows at once
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the chat page, an endpoint. It does not depend on the gateway's settings."""

    content: bytes
    media_type: str

    async def __call__(self, gateway: Gateway, request: Request) -> Response:
        """Answer the file, or 304 if the browser already has this version."""
        headers = {**HEADERS, "etag": self.etag}
        if self.etag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)

    @property
    def etag(self) -> str:
        return f'"{blake2b(self.content, digest_size=16).hexdigest()}"'


def page_files() -> dict[str, PageFile]:
    """Return the files of the chat page, by URL path."""
    found = sorted((files("sagellm.gateway") / "page").iterdir(), key=lambda file: file.name)
    return {_path(file.name): _read(file) for file in found}


def _path(name: str) -> str:
    return "/" if name == INDEX else f"/page/{name}"


def _read(file: Traversable) -> PageFile:
    suffix = file.name[file.name.rindex(".") :]
    return PageFile(file.read_bytes(), MEDIA_TYPES[suffix])


def _tags(header: str) -> set[str]:
    """Return the tags of an If-None-Match header, without weak marks (RFC 9110, 13.1.2)."""
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}


async def described(gateway: Gateway, request: Request) -> Response:
    """Answer the OpenAPI document of ROUTES."""
    settings = gateway.settings
    return Response(_document(settings.limits, bool(settings.api_keys)), media_type=_JSON)


async def docs(gateway: Gateway, request: Request) -> Response:
    """Answer the OpenAPI document as an HTML page."""
    settings = gateway.settings
    return _page(settings.limits, bool(settings.api_keys))


@lru_cache
def _document(limits: RequestLimits, needs_key: bool) -> bytes:
    return msgspec.json.encode(openapi(ROUTES, VERSION, limits, needs_key=needs_key))


@lru_cache
def _page(limits: RequestLimits, needs_key: bool) -> Response:
    return docs_page(openapi(ROUTES, VERSION, limits, needs_key=needs_key))


_JSON = "application/json"

# A probe that fails is quiet too: each change of the readiness, and a drain, has a line of its own.
_PROBE, _POLL = (200, 503), (200,)

ROUTES = (
    EndpointRoute("GET", "/live", live, access="open", while_draining=True, quiet_on=_POLL),
    EndpointRoute("GET", "/ready", ready, access="open", while_draining=True, quiet_on=_PROBE),
    EndpointRoute("GET", "/health", health, while_draining=True, quiet_on=_PROBE),
    EndpointRoute("GET", "/ping", health, while_draining=True, quiet_on=_PROBE),
    EndpointRoute("POST", "/ping", health, while_draining=True, quiet_on=_PROBE),
    EndpointRoute("GET", "/version", version, while_draining=True),
    EndpointRoute("GET", "/load", load, while_draining=True, quiet_on=_POLL),
    EndpointRoute(
        "GET", "/metrics", metrics, access="metrics", while_draining=True, quiet_on=_POLL
    ),
    # Without a key, because a browser sends none. The documents contain no secret.
    EndpointRoute("GET", "/openapi.json", described, access="open", while_draining=True),
    EndpointRoute("GET", "/docs", docs, access="open", while_draining=True),
    EndpointRoute("GET", "/v1/models", models),
    EndpointRoute("GET", "/v1/models/{id:path}", model),
    EndpointRoute("POST", "/v1/completions", completions, generates=True),
    EndpointRoute("POST", "/v1/chat/completions", chat, generates=True),
    EndpointRoute("POST", "/v1/embeddings", embeddings, generates=True),
    EndpointRoute("POST", "/v1/responses", responses, generates=True),
    EndpointRoute("POST", "/v1/responses/input_tokens", input_tokens),
    EndpointRoute("GET", "/v1/responses/{id}", stored_response),
    EndpointRoute("DELETE", "/v1/responses/{id}", stored_response),
    EndpointRoute("POST", "/v1/responses/{id}/cancel", stored_response),
    EndpointRoute("GET", "/v1/responses/{id}/input_items", stored_response),
    EndpointRoute("POST", "/v1/messages", messages, generates=True, dialect=ANTHROPIC),
    EndpointRoute("POST", "/v1/messages/count_tokens", count_tokens, dialect=ANTHROPIC),
    EndpointRoute("POST", "/invocations", invocations, generates=True),
    EndpointRoute("POST", "/v1/files", create_file, uploads=True),
    EndpointRoute("GET", "/v1/files", list_files),
    EndpointRoute("GET", "/v1/files/{id}", retrieve_file),
    EndpointRoute("DELETE", "/v1/files/{id}", delete_file),
    EndpointRoute("GET", "/v1/files/{id}/content", file_content),
    EndpointRoute("POST", "/v1/batches", create_batch),
    EndpointRoute("GET", "/v1/batches", list_batches),
    EndpointRoute("GET", "/v1/batches/{id}", retrieve_batch),
    EndpointRoute("POST", "/v1/batches/{id}/cancel", cancel_batch),
    EndpointRoute("POST", "/tokenize", tokenize),
    EndpointRoute("POST", "/detokenize", detokenize),
    EndpointRoute("GET", "/tokenizer_info", tokenizer_info),
    EndpointRoute("GET", "/v1/sagellm/graph", graph, access="admin", while_draining=True),
    EndpointRoute(
        "POST", "/v1/sagellm/requests/{id}/cancel", cancel, access="admin", while_draining=True
    ),
)
# Without a key, because a browser sends none with a page. The files contain no secret.
PAGE_ROUTES = tuple(
    EndpointRoute("GET", path, file, access="open") for path, file in page_files().items()
)
PATHS = tuple(dict.fromkeys(route.path for route in (*ROUTES, *PAGE_ROUTES)))


def routes_of(settings: Settings) -> tuple[EndpointRoute, ...]:
    """Return the routes of the API, and those of the chat page unless the settings disable it."""
    return (*ROUTES, *PAGE_ROUTES) if settings.page else ROUTES
