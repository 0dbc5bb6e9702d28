"""GET / and /page/*: the page that chats with the models, as files of this package."""

from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from sagellm.gateway.gateway import Gateway

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
