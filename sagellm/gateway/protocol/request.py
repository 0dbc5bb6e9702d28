"""The fields that the bodies of completions and chats share, and their checks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.json import fields_of
from sagellm.gateway.protocol.other_apis import (
    JSON_SCHEMA,
    RESPONSE_FORMAT,
    STREAM_OPTIONS,
    STRUCTURED_OUTPUTS,
    Foreign,
)
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.messages import PRIORITIES
from sagellm.runtime.sampling import RANGES


def within(name: str) -> Meta:
    """Return the range of a sampling parameter, from the table that all engines share."""
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 18
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LEN = 256
MAX_SALT_LEN = 64
MAX_HINT_LEN = 512
MAX_ALTERNATIVES = 8192
MAX_LABEL_LEN = 64  # as in the OpenAI API
MAX_WAIT_S = 86_400.0

TokenId: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 31)]
NonEmptyText: TypeAlias = Annotated[str, Meta(min_length=1)]
BadWord: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_LEN)]
Label: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_LABEL_LEN)]
SchemaField: TypeAlias = dict[str, Any] | NonEmptyText
Choices: TypeAlias = Annotated[list[NonEmptyText], Meta(min_length=1, max_length=MAX_ALTERNATIVES)]
Hint: TypeAlias = Annotated[str, Meta(max_length=MAX_HINT_LEN)]
WaitSeconds: TypeAlias = Annotated[float, Meta(gt=0, le=MAX_WAIT_S)]
TokenKey: TypeAlias = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,9})$(?!\n)")]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
TruncationSide: TypeAlias = Literal["left", "right"]
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# The lookahead excludes a line end, which "$" alone would allow.
RequestId: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$(?!\n)")]


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream says beside its tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema. `name` and `description` are labels.

    The answer obeys the schema whether `strict` is true, false or absent.
    """

    schema: dict[str, Any]
    name: Label | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer, as in the OpenAI API: any text, any JSON object, or the JSON of a
    schema.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer, as in vLLM. Exactly one field is given.

    `json`: a JSON schema, or its text. `choice`: all answers that are allowed. `grammar`: a
    context-free grammar.
    """

    json: SchemaField | None = None
    regex: NonEmptyText | None = None
    choice: Choices | None = None
    grammar: NonEmptyText | None = None
    json_object: bool | None = None


class Generation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that completions and chats share. A null field counts as not given.

    `max_tokens` and `max_completion_tokens` are two names of one limit. `priority` is from 0
    (critical) to 4 (background). The hints are accepted and have no effect.
    """

    model: str | None = None
    max_tokens: Annotated[int, within("max_tokens")] | None = None
    max_completion_tokens: Annotated[int, within("max_tokens")] | None = None
    n: Annotated[int, within("n")] = 1
    temperature: Annotated[float, within("temperature")] = 1.0
    top_p: Annotated[float, within("top_p")] = 1.0
    presence_penalty: Annotated[float, within("presence_penalty")] = 0.0
    frequency_penalty: Annotated[float, within("frequency_penalty")] = 0.0
    logit_bias: dict[TokenKey, Bias] = {}
    seed: Annotated[int, within("seed")] | None = None
    stop: NonEmptyText | list[NonEmptyText] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM
    top_k: Annotated[int, Meta(ge=-1, le=int(RANGES["top_k"][1]))] = 0  # -1 and 0: all
    min_p: Annotated[float, within("min_p")] = 0.0
    repetition_penalty: Annotated[float, within("repetition_penalty")] = 1.0
    min_tokens: Annotated[int, within("min_tokens")] = 0
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    allowed_token_ids: (
        Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None
    ) = None
    bad_words: Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)] = []
    prompt_logprobs: Annotated[int, within("prompt_logprobs")] | None = None
    return_tokens_as_token_ids: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    truncation_side: TruncationSide = "left"
    return_token_ids: bool = False
    priority: Annotated[int, Meta(ge=0, le=max(PRIORITIES.values()))] | None = None
    request_id: RequestId | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_LEN)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaField | None = None
    guided_regex: NonEmptyText | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmptyText | None = None
    # SGLang
    json_schema: SchemaField | None = None
    regex: NonEmptyText | None = None
    ebnf: NonEmptyText | None = None
    # ours
    slo_ttft_s: WaitSeconds | None = None
    timeout_s: WaitSeconds | None = None
    no_queue: bool = False
    # hints
    user: Hint | None = None
    safety_identifier: Hint | None = None
    prompt_cache_key: Hint | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings. The body may have one string or a list."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def asked_tokens(self) -> int | None:
        """The requested limit of the answer's tokens, under either name; None if not given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def is_structured(self) -> bool:
        """Whether a field may bind the answer to a grammar."""
        return any(getattr(self, name) is not None for name in STRUCTURE)

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with an event that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        """Whether each event of a stream has the usage up to this event."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


# The fields that bind an answer to a grammar.
STRUCTURE = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
    "ebnf",
)


def check_generation(request: Generation, limits: RequestLimits) -> None:
    """Raise ApiError (400) for fields beyond `limits` or in conflict, 404 for a model's name."""
    check_model_name(request.model, limits)
    at_most("n", request.n, limits.num_choices)
    at_most("logit_bias", len(request.logit_bias), limits.num_logit_bias, "entries")
    _check_stops(request, limits)
    _check_pairs(request)


def check_model_name(name: str | None, limits: RequestLimits) -> None:
    """Raise ApiError (404) if the name is longer than any model's name may be."""
    if name is not None and len(name) > limits.model_name_len:
        message = f"model: there is none with a name of {len(name)} characters"
        raise ApiError(404, message, param="model", code="model_not_found")


def at_most(param: str, number: int, limit: int, unit: str = "") -> None:
    """Raise ApiError (400) if `number` exceeds `limit`. `unit`: the word for counted things."""
    if number > limit:
        what = f"has {number} {unit}" if unit else f"is {number}"
        raise wrong(param, f"{what}; the limit is {limit}")


def _check_stops(request: Generation, limits: RequestLimits) -> None:
    at_most("stop", len(request.stops), limits.num_stop, "strings")
    for text in request.stops:
        at_most("stop", len(text.encode()), limits.stop_bytes, "bytes in one string")


def _check_pairs(request: Generation) -> None:
    """Raise ApiError (400) for fields that conflict, and for a truncation to 0 tokens."""
    asked = request.max_tokens, request.max_completion_tokens
    if None not in asked and asked[0] != asked[1]:
        raise wrong("max_tokens", f"is {asked[0]}, but max_completion_tokens is {asked[1]}")
    if request.truncate_prompt_tokens == 0:
        raise wrong("truncate_prompt_tokens", "is 0; it must be 1 or more, or -1 for the context")


def known_fields(value: Any, struct: type[msgspec.Struct], foreign: Foreign) -> dict[str, Any]:
    """Return the fields of a parsed body that `struct` has. Types are not yet checked.

    Raises ApiError (400) for unknown or unsupported fields.
    """
    return read_nested(fields_of(value, struct.__struct_fields__, foreign), NESTED)


class NestedObject(NamedTuple):
    """An object in a body: its type, the fields of other APIs that it may have, objects in it."""

    struct: type[msgspec.Struct]
    foreign: Foreign
    inner: "Mapping[str, NestedObject]" = MappingProxyType({})


NESTED = {
    "stream_options": NestedObject(StreamOptions, STREAM_OPTIONS),
    "response_format": NestedObject(
        ResponseFormat,
        RESPONSE_FORMAT,
        {"json_schema": NestedObject(JsonSchemaFormat, JSON_SCHEMA)},
    ),
    "structured_outputs": NestedObject(StructuredOutputs, STRUCTURED_OUTPUTS),
}


def read_nested(
    said: dict[str, Any], nested: Mapping[str, NestedObject], prefix: str = ""
) -> dict[str, Any]:
    """Return the fields of an object, where the objects in it have their known fields only.

    Raises ApiError (400) with the place of the first unknown or unsupported field.
    """
    found = dict(said)
    for name, (struct, foreign, inner) in nested.items():
        if name in found:
            where = prefix + name
            fields = fields_of(found[name], struct.__struct_fields__, foreign, where)
            found[name] = read_nested(fields, inner, f"{where}.")
    return found
