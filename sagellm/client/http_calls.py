"""HTTP calls: server addresses, headers, request bodies, and answers other than generated text."""

import os
import ssl
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import httpx2
import msgspec

from sagellm.client.replies import read_body
from sagellm.client.responses import BAD_ANSWER, NOT_OFFERED, UNREACHABLE, ClientError

URL_VARIABLE, KEY_VARIABLE = "SAGELLM_URL", "SAGELLM_API_KEY"
LOCAL = ("http://127.0.0.1:8000", "http://127.0.0.1:8889")
PROBE_S = 0.5
_LOCKED = (401, 403)


def read_url(url: str) -> str:
    """Normalise the URL of a server: add a scheme, remove a slash and `/v1` at the end.

    Raises ClientError for a text that is no HTTP URL.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        read = httpx2.URL(whole)
    except httpx2.InvalidURL as error:
        raise ClientError(f"{url!r} is not a URL: {error}", code=NOT_OFFERED) from None
    if read.scheme not in ("http", "https") or not read.host:
        raise ClientError(f"{url!r} is not the URL of an HTTP server", code=NOT_OFFERED)
    return whole.rstrip("/").removesuffix("/v1").rstrip("/")


def configured_url(url: str | None) -> str | None:
    """The given URL, or else the URL in the variable SAGELLM_URL, or None."""
    named = url or os.environ.get(URL_VARIABLE)
    return read_url(named) if named else None


def configured_key(api_key: str | None) -> str | None:
    return api_key if api_key is not None else os.environ.get(KEY_VARIABLE)


def request_headers(api_key: str | None) -> dict[str, str]:
    """The headers of every call. They disable compression, which would delay a stream's chunks."""
    plain = {"Accept-Encoding": "identity", "User-Agent": "sagellm"}
    return {**plain, "Authorization": f"Bearer {api_key}"} if api_key else plain


def is_local(url: str) -> bool:
    """Whether a URL names this machine; then a proxy must not be used."""
    host = httpx2.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def transport_options(url: str, api_key: str | None, timeout_s: float) -> Mapping[str, object]:
    """The options of a client of httpx2 for one server, blocking or async."""
    return {
        "base_url": url,
        "headers": request_headers(api_key),
        # Answers may take long, but connecting may not: notice an absent host soon.
        "timeout": httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
        "trust_env": not is_local(url),  # ignore proxies for this machine
        "verify": ssl.create_default_context(),  # reads SSL_CERT_FILE even without trust_env
        # Unlimited: the default of httpx2 would queue requests of a large load in the client.
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=None),
    }


def is_server(status: int, body: bytes) -> bool:
    """Whether an answer to `/v1/models` comes from an OpenAI-compatible server.

    A server that wants an API key answers 401 or 403 with an error body.
    """
    if status in _LOCKED:
        return b"error" in body
    try:
        found = msgspec.json.decode(body)
    except ValueError:
        return False
    return status == 200 and isinstance(found, dict) and isinstance(found.get("data"), list)


def no_server() -> ClientError:
    """The error if no server answers at the local addresses."""
    tried = ", ".join(LOCAL)
    fix = f"start one with `sagellm serve`, give a URL, or set {URL_VARIABLE}"
    return ClientError(f"no server answers at {tried}; {fix}", code=UNREACHABLE)


def check_embedded(url: str | None, api_key: str | None) -> None:
    """Raise ClientError if a URL or a key is given with `embedded`, which would ignore it."""
    given = "URL" if url is not None else "API key"
    if url is not None or api_key is not None:
        cause = f"an embedded graph has no {given}; leave one of the two out"
        raise ClientError(cause, code=NOT_OFFERED)


Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODELS, HEALTH, LOAD, VERSION = "/v1/models", "/health", "/load", "/version"
_STREAM_OPTIONS = "stream_options"
_REFUSED_FIELD = (400, 422)  # HTTP statuses for an unknown field
_ABSENT = (404, 405, 501)  # HTTP statuses of a server without the endpoint


def encode_call(
    call: Mapping[str, Any], options: Mapping[str, Any], model: str, stream: bool
) -> bytes:
    """The body of a call. Options go to the server unchanged."""
    return encode_json({"model": model, **call, **options, "stream": stream})


def with_usage(options: Mapping[str, Any], stream: bool) -> Mapping[str, Any]:
    """The options of a call, which ask for the usage of a stream unless `stream_options` is given.

    Returns `options` itself if nothing is added.
    """
    if not stream or options.get(_STREAM_OPTIONS) is not None:
        return options
    return {**options, _STREAM_OPTIONS: {"include_usage": True}}


def refuses_usage(error: ClientError) -> bool:
    """Whether a server refused a call because it does not know `stream_options`."""
    return error.status in _REFUSED_FIELD and _STREAM_OPTIONS in f"{error.param} {error.message}"


def encode_json(body: Mapping[str, Any]) -> bytes:
    """Encode a body as JSON. Raises ClientError for values that JSON cannot hold."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, UnicodeEncodeError, RecursionError) as error:
        raise ClientError(f"the call is no JSON: {error}", code=NOT_OFFERED) from None


def is_stream(headers: Mapping[str, str]) -> bool:
    kind, _, _ = headers.get("content-type", "").partition(";")
    return kind.strip().lower() == "text/event-stream"


def not_streamed(body: bytes) -> ClientError:
    """The error for a response that is no stream although a stream was requested."""
    try:
        read_body(body)
    except ClientError as error:
        return error
    return ClientError("the server does not stream: it sent the whole answer", code=BAD_ANSWER)


def read_model_ids(body: bytes) -> list[str]:
    """The model names in an answer of `/v1/models`. Raises ClientError for any other answer."""
    try:
        return [str(entry["id"]) for entry in msgspec.json.decode(body)["data"]]
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ClientError("/v1/models is no list of models", code=BAD_ANSWER) from error


def first_model_of(models: Sequence[str]) -> str:
    if not models:
        raise ClientError("the server serves no model", code=NOT_OFFERED)
    return models[0]


def read_embeddings(body: bytes) -> list[list[float]]:
    """The embeddings in the order of the texts. Raises ClientError for any other answer."""
    try:
        entries = msgspec.json.decode(body)["data"]
        ordered = sorted(entries, key=lambda entry: entry["index"])
        return [[float(value) for value in entry["embedding"]] for entry in ordered]
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ClientError("the answer holds no embeddings", code=BAD_ANSWER) from error


def texts_of(texts: str | Iterable[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def without_embeddings(error: ClientError) -> ClientError:
    """Explain the error of a server without `/v1/embeddings`; other errors stay unchanged."""
    if error.status not in _ABSENT:
        return error
    cause = f"this server has no embeddings: {error.message}"
    return ClientError(cause, status=error.status, code=NOT_OFFERED, type=error.type)


def server_status(
    url: str, models: Sequence[str], is_ready: bool, load: bytes | None, version: bytes | None
) -> dict[str, Any]:
    """The value of `get_status` for a server. None stands for facts that it does not publish."""
    return {
        "mode": "http",
        "url": url,
        "is_ready": is_ready,
        "models": list(models),
        "server_load": _read_field(load, "server_load"),
        "version": _read_field(version, "version"),
    }


def _read_field(body: bytes | None, name: str) -> Any:
    try:
        return msgspec.json.decode(body)[name] if body else None
    except (ValueError, TypeError, KeyError, UnicodeDecodeError):
        return None
