"""The OpenAPI 3.1 document of all routes: bodies, answers, ranges and errors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sagellm.gateway.answers import anthropic_objects, objects
from sagellm.gateway.answers import stored_objects as stored
from sagellm.gateway.answers.responses_objects import CountedInput, ResponseObject
from sagellm.gateway.protocol.anthropic_fields import CountTokensRequest, MessagesRequest
from sagellm.gateway.protocol.batch_bodies import LIFE_S, BatchCreation
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizePrompt,
)
from sagellm.gateway.protocol.embedding_body import EmbeddingRequest
from sagellm.gateway.protocol.responses_fields import ResponsesRequest
from sagellm.gateway.protocol.schemas import Schema, Struct, reference, schemas_of
from sagellm.gateway.settings import RequestLimits

EVENTS = "text/event-stream"
TEXT = "text/plain"
HTML = "text/html"
BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Operation:
    """The description of one path.

    `takes`: the alternative types of the body. `gives`: those of the JSON answer. `also`: another
    media type of the answer. `is_empty`: the answer has no body. `is_anthropic`: keys and errors
    are those of the Anthropic API. `form`: the schema of a multipart body. `query`: the schemas of
    the names that a query may have. `stores`: the path is one of files and batches, which need a
    folder of the server's.
    """

    summary: str
    takes: tuple[Struct, ...] = ()
    gives: tuple[Struct, ...] = ()
    also: str = ""
    is_empty: bool = False
    is_anthropic: bool = False
    form: Schema | None = None
    query: Mapping[str, Schema] = field(default_factory=dict)
    stores: bool = False


_AFTER = {"type": "string", "description": "the last id of the page before"}
_FILES_QUERY: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
    "after": _AFTER,
    "order": {"enum": ["asc", "desc"]},
    "purpose": {"enum": ["batch", "batch_output"]},
}
_PAGE_QUERY: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "after": _AFTER,
}
_UPLOAD: Schema = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "minLength": 1},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": LIFE_S[0], "maximum": LIFE_S[1]},
    },
}

OPERATIONS: dict[str, Operation] = {
    "/v1/models": Operation("The models that are served", gives=(objects.ModelList,)),
    "/v1/models/{id}": Operation("One model", gives=(objects.ModelEntry,)),
    "/v1/completions": Operation(
        "Continue a text", (CompletionRequest,), (objects.Completion,), EVENTS
    ),
    "/v1/chat/completions": Operation(
        "Answer a conversation", (ChatRequest,), (objects.ChatCompletion,), EVENTS
    ),
    "/v1/embeddings": Operation(
        "The vectors of texts", (EmbeddingRequest,), (objects.EmbeddingList,)
    ),
    "/v1/responses": Operation(
        "Answer a conversation of items", (ResponsesRequest,), (ResponseObject,), EVENTS
    ),
    "/v1/responses/input_tokens": Operation(
        "Count the tokens of a conversation of items", (ResponsesRequest,), (CountedInput,)
    ),
    "/v1/responses/{id}": Operation("Nothing: responses are not stored", is_empty=True),
    "/v1/responses/{id}/cancel": Operation("Nothing: responses are not stored", is_empty=True),
    "/v1/responses/{id}/input_items": Operation("Nothing: responses are not stored", is_empty=True),
    "/v1/messages": Operation(
        "Answer a conversation, in the Anthropic API",
        (MessagesRequest,),
        (anthropic_objects.AnsweredMessage,),
        EVENTS,
        is_anthropic=True,
    ),
    "/v1/messages/count_tokens": Operation(
        "Count the tokens of a conversation, in the Anthropic API",
        (CountTokensRequest,),
        (anthropic_objects.CountedTokens,),
        is_anthropic=True,
    ),
    "/invocations": Operation(
        "A completion or a chat, by what the body holds",
        (CompletionRequest, ChatRequest),
        (objects.Completion, objects.ChatCompletion),
        EVENTS,
    ),
    "/tokenize": Operation(
        "Text to token ids", (TokenizePrompt, TokenizeChat), (objects.TokenizeAnswer,)
    ),
    "/detokenize": Operation("Token ids to text", (DetokenizeRequest,), (objects.Detokenized,)),
    "/tokenizer_info": Operation("Facts of the tokenizer", gives=(objects.TokenizerFacts,)),
    "/v1/sagellm/requests/{id}/cancel": Operation("End a request", gives=(objects.Cancelled,)),
    "/live": Operation("Whether the process answers", is_empty=True),
    "/ready": Operation("Whether tokens are being produced", is_empty=True),
    "/health": Operation("Whether the server is healthy", is_empty=True),
    "/ping": Operation("Whether the server is healthy", is_empty=True),
    "/openapi.json": Operation("This document"),
    "/docs": Operation("This document as a page", also=HTML),
    "/version": Operation("The version of this server"),
    "/load": Operation("How many requests are under way"),
    "/metrics": Operation("Metrics in the format of Prometheus", also=TEXT),
    "/v1/sagellm/graph": Operation("The graph that is open"),
    "/v1/files": Operation(
        "The stored files", gives=(stored.StoredFiles,), query=_FILES_QUERY, stores=True
    ),
    "/v1/files/{id}": Operation("One stored file", gives=(stored.StoredFile,), stores=True),
    "/v1/files/{id}/content": Operation("The bytes of a file", also=BYTES, stores=True),
    "/v1/batches": Operation(
        "The batches, newest first", gives=(stored.StoredBatches,), query=_PAGE_QUERY, stores=True
    ),
    "/v1/batches/{id}": Operation("One batch", gives=(stored.StoredBatch,), stores=True),
    "/v1/batches/{id}/cancel": Operation("End a batch", gives=(stored.StoredBatch,), stores=True),
}
# Methods of a path that do something else than its entry in OPERATIONS says.
BY_METHOD: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/files"): Operation(
        "Store a file of requests", gives=(stored.StoredFile,), form=_UPLOAD, stores=True
    ),
    ("DELETE", "/v1/files/{id}"): Operation(
        "Delete a file", gives=(stored.DeletedFile,), stores=True
    ),
    ("POST", "/v1/batches"): Operation(
        "Work through a file of requests in the background",
        (BatchCreation,),
        (stored.StoredBatch,),
        stores=True,
    ),
}


# Status -> description: errors of any call, and below, further errors of calls with a body.
_REFUSALS = {
    400: "The request is wrong; `param` names the field",
    401: "A valid API key is needed",
    403: "This key, or this origin, may not",
    404: "There is no such model, request or path",
    405: "The path does not answer to this method",
    421: "The server is not known by this name",
    429: "Too many requests of this key are open",
    431: "The headers are too many or too large",
    500: "The server failed; the message names the request for the operator",
    503: "The server is overloaded, draining or not ready",
}
_BODY_REFUSALS = {
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is encoded",
    504: "The request took longer than it may",
}
_STORE_REFUSALS = {
    409: "The batch has ended already",
    507: "The server has no room for files",
}
# OpenAPI 3.1 cannot describe an event stream. A string would be wrong, so it has no schema.
_ALSO: dict[str, Schema] = {
    EVENTS: {},
    TEXT: {"schema": {"type": "string"}},
    HTML: {"schema": {"type": "string"}},
    BYTES: {},
}
_WAITS = (429, 503)
_ANTHROPIC = "Anthropic"  # before the status, in the names of this API's errors
_PARAMETER = re.compile(r"{(\w+)(?::path)?}")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_KEYS = {
    "user": "an API key",
    "admin": "the admin key",
}
_X_API_KEY = {
    "type": "apiKey",
    "in": "header",
    "name": "x-api-key",
    "description": "an API key, or the admin key",
}


class DescribedRoute(Protocol):
    """The fields of a route that this module reads."""

    @property
    def method(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def access(self) -> str:
        """ "open", "user", "admin" or "metrics"."""
        ...


def openapi(
    routes: Iterable[DescribedRoute],
    version: str,
    limits: RequestLimits | None = None,
    *,
    needs_key: bool = True,
) -> dict[str, Any]:
    """Return the OpenAPI document of routes. `needs_key`: users need a key."""
    described = (*OPERATIONS.values(), *BY_METHOD.values())
    structs = [one for known in described for one in (*known.takes, *known.gives)]
    structs.append(anthropic_objects.AnthropicFailure)
    # `dict.fromkeys` removes repeated types and keeps their order.
    schemas = schemas_of(dict.fromkeys(structs), limits or RequestLimits())
    paths: dict[str, Schema] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, needs_key)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sagellm", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "responses": _refusals(),
            "securitySchemes": _security_schemes(),
        },
    }


def _operation(route: DescribedRoute, path: str, needs_key: bool) -> Schema:
    """Return the operation of a route. A path without an entry in OPERATIONS answers JSON."""
    known = BY_METHOD.get((route.method, path)) or OPERATIONS.get(path) or Operation(path)
    parameters = [_parameter(name) for name in _PARAMETER.findall(path)]
    parameters += [
        {"name": name, "in": "query", "schema": one} for name, one in known.query.items()
    ]
    operation: Schema = {
        "summary": known.summary,
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', path)}",
        "responses": {"200": _answer(known)} | _refusal_references(known),
        "security": _security(route, known, needs_key),
    }
    if parameters:
        operation["parameters"] = parameters
    if known.takes:
        content = {"application/json": {"schema": _either(known.takes)}}
        operation["requestBody"] = {"required": True, "content": content}
    if known.form is not None:
        content = {"multipart/form-data": {"schema": known.form}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answer(known: Operation) -> Schema:
    if known.is_empty:
        return {"description": known.summary}
    content: Schema = {known.also: _ALSO[known.also]} if known.also else {}
    if known.gives or not known.also:
        content["application/json"] = {"schema": _either(known.gives)}
    return {"description": known.summary, "content": content}


def _either(structs: tuple[Struct, ...]) -> Schema:
    references = [reference(struct) for struct in structs]
    return references[0] if len(references) == 1 else {"anyOf": references} if references else {}


def _parameter(name: str) -> Schema:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _refusal_references(known: Operation) -> Schema:
    has_body = known.takes or known.form is not None
    codes = [
        *_REFUSALS,
        *(_BODY_REFUSALS if has_body else ()),
        *(_STORE_REFUSALS if known.stores else ()),
    ]
    api = _ANTHROPIC if known.is_anthropic else ""
    return {str(code): {"$ref": f"#/components/responses/{api}{code}"} for code in sorted(codes)}


def _refusals() -> Schema:
    """Return the descriptions of errors, for each API under names of its own."""
    reasons = sorted((_REFUSALS | _BODY_REFUSALS | _STORE_REFUSALS).items())
    plain = {str(code): _refusal(code, why, "Error") for code, why in reasons}
    name = anthropic_objects.AnthropicFailure.__name__
    return plain | {f"{_ANTHROPIC}{code}": _refusal(code, why, name) for code, why in reasons}


def _refusal(code: int, why: str, schema: str) -> Schema:
    error = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    refusal: Schema = {"description": why, "content": {"application/json": error}}
    if code in _WAITS:
        seconds = {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
        refusal["headers"] = {"Retry-After": seconds}
    return refusal


def _security_schemes() -> Schema:
    bearers = {
        name: {"type": "http", "scheme": "bearer", "description": what}
        for name, what in _KEYS.items()
    }
    return {**bearers, "x_api_key": _X_API_KEY}


def _security(route: DescribedRoute, known: Operation, needs_key: bool) -> list[Schema]:
    """Return the alternative keys of a route; an empty list if no key is needed."""
    if route.access == "admin":
        return [{"admin": []}]
    if route.access == "open" or not needs_key:
        return []
    more: list[Schema] = [{"x_api_key": []}] if known.is_anthropic else []
    return [{"user": []}, {"admin": []}, *more]
