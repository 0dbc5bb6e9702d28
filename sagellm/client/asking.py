"""Bodies of calls, and what is read out of the answers that are no texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from sagellm.client.answers import read_body
from sagellm.client.failure import BAD_ANSWER, NOT_OFFERED, ClientError

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODELS, HEALTH, LOAD, VERSION = "/v1/models", "/health", "/load", "/version"
_ABSENT = (404, 405, 501)


def encode(call: Mapping[str, Any], options: Mapping[str, Any], model: str, stream: bool) -> bytes:
    """The body of a call; options go to the server as they are given."""
    return encode_plain({"model": model, **call, **options, "stream": stream})


def encode_plain(body: Mapping[str, Any]) -> bytes:
    """JSON. Raises ClientError for what cannot be."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, UnicodeEncodeError) as error:
        raise ClientError(f"the call is no JSON: {error}", code=NOT_OFFERED) from None


def is_stream(headers: Mapping[str, str]) -> bool:
    kind, _, _ = headers.get("content-type", "").partition(";")
    return kind.strip().lower() == "text/event-stream"


def not_streamed(body: bytes) -> ClientError:
    """What is wrong with an answer that was asked for as a stream and is none."""
    try:
        read_body(body)
    except ClientError as error:
        return error
    return ClientError("the server does not stream: it sent the whole answer", code=BAD_ANSWER)


def model_ids(body: bytes) -> list[str]:
    """The names in `/v1/models`. Raises ClientError where it is no such list."""
    try:
        return [str(entry["id"]) for entry in msgspec.json.decode(body)["data"]]
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ClientError("/v1/models is no list of models", code=BAD_ANSWER) from error


def first_of(models: Sequence[str]) -> str:
    if not models:
        raise ClientError("the server serves no model", code=NOT_OFFERED)
    return models[0]


def vectors(body: bytes) -> list[list[float]]:
    """Embeddings in the order of the texts."""
    try:
        entries = msgspec.json.decode(body)["data"]
        ordered = sorted(entries, key=lambda entry: entry["index"])
        return [[float(value) for value in entry["embedding"]] for entry in ordered]
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ClientError("the answer holds no embeddings", code=BAD_ANSWER) from error


def texts_of(texts: str | Iterable[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def without_embeddings(error: ClientError) -> ClientError:
    """Says so where the server has no such endpoint; any other error as it is."""
    if error.status not in _ABSENT:
        return error
    cause = f"this server has no embeddings: {error.message}"
    return ClientError(cause, status=error.status, code=NOT_OFFERED, type=error.type)


def status(
    url: str, models: Sequence[str], is_ready: bool, load: bytes | None, version: bytes | None
) -> dict[str, Any]:
    """What `get_status` says of a server; None for what it does not tell."""
    return {
        "mode": "http",
        "url": url,
        "is_ready": is_ready,
        "models": list(models),
        "server_load": _field(load, "server_load"),
        "version": _field(version, "version"),
    }


def _field(body: bytes | None, name: str) -> Any:
    try:
        return msgspec.json.decode(body)[name] if body else None
    except (ValueError, TypeError, KeyError, UnicodeDecodeError):
        return None
