"""Which server to talk to: a URL, what the environment says, or one of this machine."""

import os
import ssl
from collections.abc import Mapping
from ipaddress import ip_address

import httpx2
import msgspec

from sagellm.client.failure import NOT_OFFERED, UNREACHABLE, ClientError

URL_VARIABLE, KEY_VARIABLE = "SAGELLM_URL", "SAGELLM_API_KEY"
LOCAL = ("http://127.0.0.1:8000", "http://127.0.0.1:8889")
PROBE_S = 0.5
_LOCKED = (401, 403)


def read_url(url: str) -> str:
    """The root of a server: a scheme in front, no slash and no `/v1` behind. Raises ClientError."""
    whole = url if "://" in url else f"http://{url}"
    try:
        read = httpx2.URL(whole)
    except httpx2.InvalidURL as error:
        raise ClientError(f"{url!r} is not a URL: {error}", code=NOT_OFFERED) from None
    if read.scheme not in ("http", "https") or not read.host:
        raise ClientError(f"{url!r} is not the URL of an HTTP server", code=NOT_OFFERED)
    return whole.rstrip("/").removesuffix("/v1").rstrip("/")


def given_url(url: str | None) -> str | None:
    """The URL that the caller or the environment names, if one does."""
    named = url or os.environ.get(URL_VARIABLE)
    return read_url(named) if named else None


def given_key(api_key: str | None) -> str | None:
    return api_key if api_key is not None else os.environ.get(KEY_VARIABLE)


def headers(api_key: str | None) -> dict[str, str]:
    """What every call sends. A stream that is compressed comes in lumps, so none is asked for."""
    plain = {"Accept-Encoding": "identity", "User-Agent": "sagellm"}
    return {**plain, "Authorization": f"Bearer {api_key}"} if api_key else plain


def is_local(url: str) -> bool:
    """Whether a URL names this machine, which no proxy of the environment can reach."""
    host = httpx2.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def transport_options(url: str, api_key: str | None, timeout_s: float) -> Mapping[str, object]:
    """How a httpx2 client for one server is set up; blocking and not, the same."""
    return {
        "base_url": url,
        "headers": headers(api_key),
        "timeout": httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
        "trust_env": not is_local(url),  # no proxy stands before this machine
        "verify": ssl.create_default_context(),  # obeys SSL_CERT_FILE wherever the server is
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=None),
    }


def is_server(status: int, body: bytes) -> bool:
    """Whether `/v1/models` was answered as an OpenAI-compatible server does."""
    if status in _LOCKED:
        return b"error" in body
    try:
        found = msgspec.json.decode(body)
    except ValueError:
        return False
    return status == 200 and isinstance(found, dict) and isinstance(found.get("data"), list)


def nobody() -> ClientError:
    """No server was found."""
    tried = ", ".join(LOCAL)
    fix = f"start one with `sagellm serve`, give a URL, or set {URL_VARIABLE}"
    return ClientError(f"no server answers at {tried}; {fix}", code=UNREACHABLE)


def check_embedded(url: str | None) -> None:
    """Raise ClientError for a URL beside `embedded`: one of the two would be ignored."""
    if url is not None:
        cause = "an embedded graph has no URL; leave one of the two out"
        raise ClientError(cause, code=NOT_OFFERED)
