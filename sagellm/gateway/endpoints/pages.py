"""GET /docs and the chat page at /: files of this package; nothing is loaded from elsewhere."""

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.gateway import Gateway

_KEYS = {"user": "an API key", "admin": "the admin key"}


def docs_page(document: dict[str, Any]) -> Response:
    """The page of one document."""
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
    return " or ".join(_KEYS[name] for way in operation["security"] for name in way)


def _names(content: dict[str, Any]) -> str:
    """The schemas that a body may have."""
    return " or ".join(re.findall(r"#/components/schemas/(\w+)", str(content)))


def _answers(document: dict[str, Any], operation: dict[str, Any]) -> Iterator[tuple[str, str]]:
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
    """What the policy allows: the bytes between the tags."""
    return b64encode(sha256(style.encode()).digest()).decode()


INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, no form that leaves the page, and nobody frames it.
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
    "cache-control": "no-cache",  # kept, and asked for again: a new version shows at once
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page, which every gateway serves alike: it depends on no setting."""

    content: bytes
    media_type: str

    async def __call__(self, gateway: Gateway, request: Request) -> Response:
        """The file; 304 where the browser has it."""
        headers = {**HEADERS, "etag": self.etag}
        if self.etag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)

    @property
    def etag(self) -> str:
        return f'"{blake2b(self.content, digest_size=16).hexdigest()}"'


def page_files() -> dict[str, PageFile]:
    """Each file by its path on the server."""
    found = sorted((files("sagellm.gateway") / "page").iterdir(), key=lambda file: file.name)
    return {_path(file.name): _read(file) for file in found}


def _path(name: str) -> str:
    return "/" if name == INDEX else f"/page/{name}"


def _read(file: Traversable) -> PageFile:
    suffix = file.name[file.name.rindex(".") :]
    return PageFile(file.read_bytes(), MEDIA_TYPES[suffix])


def _tags(header: str) -> set[str]:
    """The entity tags of If-None-Match; weak ones compare as strong ones (RFC 9110, 13.1.2)."""
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}
