"""JSON schemas of request bodies and answers, with the limits of this gateway."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from inspect import cleandoc
from typing import Any, TypeAlias

import msgspec

from sagellm.gateway.answers.objects import (
    ApiUsage,
    EmbeddingEntry,
    ModelEntry,
    ModelList,
    TokenizeAnswer,
)
from sagellm.gateway.protocol.anthropic_fields import SENT_OBJECTS
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
from sagellm.gateway.protocol.embedding_body import EMBEDDING, EmbeddingRequest
from sagellm.gateway.protocol.other_apis import (
    FUNCTION_CALL,
    JSON_SCHEMA,
    MESSAGE,
    PART,
    REQUEST,
    RESPONSE_FORMAT,
    STREAM_OPTIONS,
    STRUCTURED_OUTPUTS,
    TOOL,
    TOOL_CALL,
    TOOL_FUNCTION,
    Foreign,
)
from sagellm.gateway.protocol.request import (
    JsonSchemaFormat,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)
from sagellm.gateway.protocol.responses_fields import (
    RENAMED,
    SENT,
    SHARED,
    InputMessage,
    ItemReference,
    ResponsesRequest,
)
from sagellm.gateway.protocol.tool_choice import Tool, ToolFunction
from sagellm.gateway.settings import RequestLimits

Schema: TypeAlias = dict[str, Any]
Struct: TypeAlias = type[msgspec.Struct]

_PLACE = "#/components/schemas/{name}"
_NULL: Schema = {"type": "null"}
# The structs that clients send, and the fields of other APIs that each may also have.
_SENT: dict[Struct, Foreign] = {
    CompletionRequest: REQUEST,
    ChatRequest: REQUEST,
    TokenizePrompt: REQUEST,
    TokenizeChat: REQUEST,
    DetokenizeRequest: REQUEST,
    EmbeddingRequest: EMBEDDING,
    StreamOptions: STREAM_OPTIONS,
    ResponseFormat: RESPONSE_FORMAT,
    JsonSchemaFormat: JSON_SCHEMA,
    StructuredOutputs: STRUCTURED_OUTPUTS,
    ConversationMessage: MESSAGE,
    TextPart: PART,
    Tool: TOOL,
    ToolFunction: TOOL_FUNCTION,
    ToolCall: TOOL_CALL,
    FunctionCall: FUNCTION_CALL,
    **SENT,
    **SENT_OBJECTS,
}
# Published names of schemas that differ from the names of the Python types.
_PUBLISHED: dict[Struct, str] = {
    ApiUsage: "Usage",
    ConversationMessage: "Message",
    ModelEntry: "Model",
    ModelList: "Models",
    TokenizeAnswer: "Tokens",
    ToolFunction: "Function",
}
# A message must have content, or be an assistant's message with tool calls.
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
    """Return the schemas of `structs` and of all structs that they contain, by published name."""
    _, components = msgspec.json.schema_components(structs, ref_template=_PLACE)
    schemas = _published(components)
    for struct, foreign in _SENT.items():
        if _name(struct) in schemas:
            _open(schemas[_name(struct)], foreign)
    if _name(ConversationMessage) in schemas:
        schemas[_name(ConversationMessage)] |= _HAS_CONTENT
    if _name(ResponsesRequest) in schemas:
        _share_chat_fields(schemas)
        for struct in (InputMessage, ItemReference):
            schemas[_name(struct)]["required"].remove("type")
    for schema in schemas.values():
        schema["description"] = cleandoc(str(schema.get("description", schema["title"])))
        _bound(schema.get("properties", {}), limits)
    if _name(CompletionRequest) in schemas:
        properties = schemas[_name(CompletionRequest)]["properties"]
        properties["prompt"] = _prompt(limits)
        properties["best_of"] = {"enum": [None, 1], "description": "or the value of `n`"}
    if _name(EmbeddingRequest) in schemas:
        schemas[_name(EmbeddingRequest)]["properties"]["input"] = _prompt(limits)
    if _name(EmbeddingEntry) in schemas:
        numbers = {"type": "array", "items": {"type": "number"}}
        vector = {"anyOf": [numbers, {"type": "string", "contentEncoding": "base64"}]}
        schemas[_name(EmbeddingEntry)]["properties"]["embedding"] = vector
    return schemas


def reference(struct: Struct) -> Schema:
    return {"$ref": _PLACE.format(name=_name(struct))}


def _name(struct: Struct) -> str:
    return _PUBLISHED.get(struct, struct.__name__)


def _published(components: dict[str, Schema]) -> dict[str, Schema]:
    """Rename schemas, and the references between them, to their published names."""
    names = {struct.__name__: name for struct, name in _PUBLISHED.items()}
    words = names | {_PLACE.format(name=old): _PLACE.format(name=new) for old, new in names.items()}

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {
            key: words.get(each, each)
            if isinstance(each, str) and key in ("title", "$ref")
            else renamed(each)
            for key, each in value.items()
        }

    return {names.get(name, name): renamed(schema) for name, schema in components.items()}


def _open(schema: Schema, foreign: Foreign) -> None:
    """Change a schema so that optional fields may be null and fields of other APIs are allowed.

    Fields that are not built only allow null and their defaults.
    """
    properties, required = schema["properties"], schema.get("required", ())
    for name, known in properties.items():
        if name not in required:
            properties[name] = _or_null(known)
    for name, harmless in foreign.unbuilt.items():
        # A copy, because schemas are changed in place.
        properties.setdefault(name, {"enum": [None, *deepcopy(harmless)]})
    for name, taken in foreign.taken.items():
        properties.setdefault(name, {"type": [taken.type, "null"], "description": taken.note})
    schema["additionalProperties"] = _NULL


def _share_chat_fields(schemas: dict[str, Schema]) -> None:
    """Add the fields of a response's body that are checked as those of a chat."""
    chat = schemas[_name(ChatRequest)]["properties"]
    names = {name: name for name in SHARED} | RENAMED
    more = {name: deepcopy(chat[known]) for name, known in names.items()}
    schemas[_name(ResponsesRequest)]["properties"] |= more


def _or_null(schema: Schema) -> Schema:
    if _NULL in schema.get("anyOf", ()):
        return schema
    default = {"default": schema["default"]} if "default" in schema else {}
    plain = {name: value for name, value in schema.items() if name != "default"}
    return {"anyOf": [*plain.get("anyOf", [plain]), _NULL], **default}


def _bound(properties: dict[str, Schema], limits: RequestLimits) -> None:
    """Add the limits of the settings to the schemas of properties, in place."""
    bounds: dict[str, Schema] = {
        "logit_bias": {"maxProperties": limits.num_logit_bias},
        "input": {"maxItems": limits.num_messages},
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
    if "stop_sequences" in properties:
        properties["stop_sequences"] = {"anyOf": _stop(limits)["anyOf"][1:], "default": []}


def _branches(schema: Schema) -> Iterator[Schema]:
    """Yield the alternatives of a schema, or the schema itself."""
    yield from schema.get("anyOf", [schema])


def _stop(limits: RequestLimits) -> Schema:
    text = {"type": "string", "minLength": 1, "maxLength": limits.stop_bytes}
    several = {"type": "array", "items": text, "maxItems": limits.num_stop}
    return {"anyOf": [text, several, _NULL], "default": []}


def _prompt(limits: RequestLimits) -> Schema:
    """Return the schema of `prompt`. All items of a list have one kind; no type expresses this."""
    text: Schema = {"type": "string", "minLength": 1}
    ids = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1 << 31},
    }
    several = {"type": "array", "minItems": 1, "maxItems": limits.num_prompts}
    return {"anyOf": [text, ids, {**several, "items": text}, {**several, "items": ids}]}
