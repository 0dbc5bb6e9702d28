"""GET /docs: the OpenAPI document as a page; no script, and nothing from elsewhere."""

import re
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup
from starlette.responses import Response

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
