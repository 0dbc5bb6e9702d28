"""Every route of the gateway: its endpoint, its access, whether it answers while draining."""

from functools import lru_cache

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.endpoints.completions import chat, completions, invocations
from sagellm.gateway.endpoints.pages import docs_page, page_files
from sagellm.gateway.endpoints.status import (
    VERSION,
    cancel,
    graph,
    health,
    live,
    load,
    metrics,
    model,
    models,
    ready,
    version,
)
from sagellm.gateway.endpoints.tokenize import detokenize, tokenize, tokenizer_info
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.protocol.openapi import openapi
from sagellm.gateway.routing import Route
from sagellm.gateway.settings import Limits, Settings


async def described(gateway: Gateway, request: Request) -> Response:
    """The OpenAPI document of these routes."""
    settings = gateway.settings
    return Response(_document(settings.limits, bool(settings.api_keys)), media_type=_JSON)


async def docs(gateway: Gateway, request: Request) -> Response:
    """The same as a page."""
    settings = gateway.settings
    return _page(settings.limits, bool(settings.api_keys))


@lru_cache
def _document(limits: Limits, needs_key: bool) -> bytes:
    return msgspec.json.encode(openapi(ROUTES, VERSION, limits, needs_key=needs_key))


@lru_cache
def _page(limits: Limits, needs_key: bool) -> Response:
    return docs_page(openapi(ROUTES, VERSION, limits, needs_key=needs_key))


_JSON = "application/json"

ROUTES = (
    Route("GET", "/live", live, access="open", while_draining=True),
    Route("GET", "/ready", ready, access="open", while_draining=True),
    Route("GET", "/health", health, while_draining=True),
    Route("GET", "/ping", health, while_draining=True),
    Route("POST", "/ping", health, while_draining=True),
    Route("GET", "/version", version, while_draining=True),
    Route("GET", "/load", load, while_draining=True),
    Route("GET", "/metrics", metrics, access="metrics", while_draining=True),
    # Open, as the page is: a browser has no key to send. They hold no more than the package does.
    Route("GET", "/openapi.json", described, access="open", while_draining=True),
    Route("GET", "/docs", docs, access="open", while_draining=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/models/{id:path}", model),
    Route("POST", "/v1/completions", completions, generates=True),
    Route("POST", "/v1/chat/completions", chat, generates=True),
    Route("POST", "/invocations", invocations, generates=True),
    Route("POST", "/tokenize", tokenize),
    Route("POST", "/detokenize", detokenize),
    Route("GET", "/tokenizer_info", tokenizer_info),
    Route("GET", "/v1/sagellm/graph", graph, access="admin", while_draining=True),
    Route("POST", "/v1/sagellm/requests/{id}/cancel", cancel, access="admin", while_draining=True),
)
# Open, where a key is asked, too: a browser that opens a page has no key. They hold no secret.
PAGE_ROUTES = tuple(Route("GET", path, file, access="open") for path, file in page_files().items())
PATHS = tuple(dict.fromkeys(route.path for route in (*ROUTES, *PAGE_ROUTES)))


def routes_of(settings: Settings) -> tuple[Route, ...]:
    """The routes of one gateway: those of the API, and the page unless it is off."""
    return (*ROUTES, *PAGE_ROUTES) if settings.page else ROUTES
