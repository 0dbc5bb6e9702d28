"""JSON schemas of the structs that travel, with the ranges that this gateway's limits set."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from inspect import cleandoc
from typing import Any, TypeAlias

import msgspec

from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizePrompt,
)
from sagellm.gateway.protocol.chat_messages import (
    MAX_PARTS,
    ConversationMessage,
    FunctionCall,
    TextPart,
    ToolCall,
)
from sagellm.gateway.protocol.other_apis import (
    FUNCTION_CALL,
    MESSAGE,
    PART,
    REQUEST,
    STREAM_OPTIONS,
    TOOL_CALL,
    Foreign,
)
from sagellm.gateway.protocol.request import StreamOptions
from sagellm.gateway.settings import RequestLimits

Schema: TypeAlias = dict[str, Any]
Struct: TypeAlias = type[msgspec.Struct]

_PLACE = "#/components/schemas/{name}"
_NULL: Schema = {"type": "null"}
# What clients send, with the fields that may stand there as long as they ask for nothing.
_SENT: dict[Struct, Foreign] = {
    CompletionRequest: REQUEST,
    ChatRequest: REQUEST,
    TokenizePrompt: REQUEST,
    TokenizeChat: REQUEST,
    DetokenizeRequest: REQUEST,
    StreamOptions: STREAM_OPTIONS,
    ConversationMessage: MESSAGE,
    TextPart: PART,
    ToolCall: TOOL_CALL,
    FunctionCall: FUNCTION_CALL,
}
# A message has content, unless it is one of the assistant with calls.
_HAS_CONTENT: Schema = {
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {
            "required": ["tool_calls"],
            "properties": {
                "role": {"enum": ["assistant"]},
                "tool_calls": {"type": "array", "minItems": 1},
            },
        },
    ]
}


def schemas_of(structs: Iterable[Struct], limits: RequestLimits) -> dict[str, Schema]:
    """The schema of each struct, and of those inside it, by name."""
    _, schemas = msgspec.json.schema_components(structs, ref_template=_PLACE)
    for struct, foreign in _SENT.items():
        if struct.__name__ in schemas:
            _open(schemas[struct.__name__], foreign)
    if ConversationMessage.__name__ in schemas:
        schemas[ConversationMessage.__name__] |= _HAS_CONTENT
    for schema in schemas.values():
        schema["description"] = cleandoc(schema.get("description", schema["title"]))
        _bound(schema.get("properties", {}), limits)
    if CompletionRequest.__name__ in schemas:
        properties = schemas[CompletionRequest.__name__]["properties"]
        properties["prompt"] = _prompt(limits)
        properties["best_of"] = {"enum": [None, 1], "description": "or the value of `n`"}
    return schemas


def reference(struct: Struct) -> Schema:
    return {"$ref": _PLACE.format(name=struct.__name__)}


def _open(schema: Schema, foreign: Foreign) -> None:
    """Where a field need not be said, null is as good, whatever its name; and so is asking an
    unbuilt one nothing.
    """
    properties, required = schema["properties"], schema.get("required", ())
    for name, known in properties.items():
        if name not in required:
            properties[name] = _or_null(known)
    for name, harmless in foreign.unbuilt.items():
        properties.setdefault(name, {"enum": [None, *deepcopy(harmless)]})
    for name, taken in foreign.taken.items():
        properties.setdefault(name, {"type": [taken.type, "null"], "description": taken.note})
    schema["additionalProperties"] = _NULL


def _or_null(schema: Schema) -> Schema:
    if _NULL in schema.get("anyOf", ()):
        return schema
    default = {"default": schema["default"]} if "default" in schema else {}
    plain = {name: value for name, value in schema.items() if name != "default"}
    return {"anyOf": [*plain.get("anyOf", [plain]), _NULL], **default}


def _bound(properties: dict[str, Schema], limits: RequestLimits) -> None:
    """Ranges that the types leave open, because the operator sets them."""
    bounds: dict[str, Schema] = {
        "logit_bias": {"maxProperties": limits.num_logit_bias},
        "messages": {"maxItems": limits.num_messages},
        "content": {"maxItems": MAX_PARTS},
    }
    for name, bound in bounds.items():
        for schema in _branches(properties.get(name, {})):
            if schema.get("type") in ("array", "object"):
                schema.update(bound)
    for schema in _branches(properties.get("n", {})):
        if "maximum" in schema:
            schema["maximum"] = min(schema["maximum"], limits.num_choices)
    if "stop" in properties:
        properties["stop"] = _stop(limits)


def _branches(schema: Schema) -> Iterator[Schema]:
    """The schema itself, or each that it may be."""
    yield from schema.get("anyOf", [schema])


def _stop(limits: RequestLimits) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": limits.stop_bytes}
    several = {"type": "array", "items": text, "maxItems": limits.num_stop}
    return {"anyOf": [text, several, _NULL], "default": []}


def _prompt(limits: RequestLimits) -> Schema:
    """One kind at a time, which the struct's type cannot say."""
    text: Schema = {"type": "string", "minLength": 1}
    ids = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 31},
    }
    several = {"type": "array", "minItems": 1, "maxItems": limits.num_prompts}
    return {"anyOf": [text, ids, {**several, "items": text}, {**several, "items": ids}]}
