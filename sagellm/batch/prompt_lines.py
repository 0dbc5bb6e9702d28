"""Reads the lines of a file of prompts in a thread, and parses them into requests."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from io import FileIO
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import trio
from msgspec import UNSET, Meta, UnsetType

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.request import Generation, ResponseFormat, StructuredOutputs
from sagellm.gateway.protocol.structured_outputs import (
    check_constraints,
    constraint_of,
    grammar_of,
)
from sagellm.gateway.settings import RequestLimits
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.messages import PRIORITIES
from sagellm.runtime.sampling import Grammar, Sampling

CHUNK_BYTES = 1 << 20
_MAX_DEPTH = RequestLimits().json_depth


async def numbered_lines(file: FileIO) -> AsyncIterator[tuple[int, bytes]]:
    """Yield (number, line) for each line that is not blank. Numbers begin at 1.

    A line longer than MAX_LINE_BYTES is cut to MAX_LINE_BYTES + 1 bytes, so that `parse_line`
    refuses it.

    Reads in a thread. Cancellation abandons the thread, because a read of a pipe or a terminal may
    never return. `file` must be unbuffered: the abandoned thread would hold the lock of a buffered
    file at the end of the process.
    """
    number, line = 1, bytearray()  # the line so far: a line may span several chunks
    while chunk := await trio.to_thread.run_sync(file.read, CHUNK_BYTES, abandon_on_cancel=True):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            _extend(line, end)
            if shown := _stripped(number, bytes(line)):
                yield number, shown
            number += 1
            line.clear()
        _extend(line, rest)
    if shown := _stripped(number, bytes(line)):
        yield number, shown


def _extend(line: bytearray, part: bytes) -> None:
    """Extend `line` in place. A copy for each chunk would take quadratic time for long lines."""
    line += part[: MAX_LINE_BYTES + 1 - len(line)]


def _stripped(number: int, line: bytes) -> bytes:
    """The line without white space at its ends; line 1 also without a byte order mark."""
    if len(line) > MAX_LINE_BYTES:
        return line
    return line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()


LineId: TypeAlias = str | int
LinePrompt: TypeAlias = str | list[int] | list[dict[str, str]]
LinePriority: TypeAlias = int | str

MAX_LINE_BYTES = 64 << 20  # far longer than any prompt that a model accepts


class LineTextPart(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class LineMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[LineTextPart]

    @property
    def plain(self) -> dict[str, str]:
        text = self.content
        whole = text if isinstance(text, str) else "".join(part.text for part in text)
        return {"role": self.role, "content": whole}


class LineFields(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The fields that both forms of a line share. The session checks their ranges."""

    prompt: str | list[int] | UnsetType = UNSET
    messages: Annotated[list[LineMessage], Meta(min_length=1)] | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    min_tokens: int | UnsetType = UNSET
    temperature: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    presence_penalty: float | UnsetType = UNSET
    frequency_penalty: float | UnsetType = UNSET
    logit_bias: dict[int, float] | UnsetType | None = UNSET
    seed: int | UnsetType | None = UNSET
    stop: str | list[str] | UnsetType | None = UNSET
    stop_token_ids: list[int] | UnsetType = UNSET
    include_stop_str_in_output: bool | UnsetType = UNSET
    skip_special_tokens: bool | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET
    n: int | UnsetType = UNSET
    grammar: Grammar | UnsetType | None = UNSET
    response_format: ResponseFormat | UnsetType | None = UNSET
    structured_outputs: StructuredOutputs | UnsetType | None = UNSET
    priority: LinePriority | UnsetType = UNSET


class PlainLine(LineFields, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A line in sagellm's form: all fields are at the top level."""

    id: LineId | UnsetType = UNSET
    logprobs: int | UnsetType | None = UNSET
    model: str | UnsetType = UNSET
    user_id: str | UnsetType = UNSET
    can_be_preempted: bool | UnsetType = UNSET
    slo_ttft_s: float | UnsetType = UNSET
    cost_budget: float | UnsetType = UNSET


# The fields of a plain line that are fields of its request.
PLAIN_FIELDS = ("model", "user_id", "can_be_preempted", "slo_ttft_s", "cost_budget")


class BatchBody(LineFields, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The body of an OpenAI request. `model` selects one of several models of the graph."""

    model: str | UnsetType = UNSET
    max_completion_tokens: int | UnsetType = UNSET
    logprobs: bool | int | UnsetType | None = UNSET
    top_logprobs: int | UnsetType | None = UNSET
    user: str | UnsetType = UNSET
    stream: Literal[False] | UnsetType = UNSET


class BatchLine(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A line in the form of an OpenAI batch file."""

    custom_id: str
    body: BatchBody
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"] | UnsetType = UNSET


class LineError(ValueError):
    """The error for a wrong line. `id`: the line's id, or its number if the id is unreadable."""

    def __init__(self, number: int, message: str, id: LineId | None = None) -> None:
        self.number = number
        self.id: LineId = number if id is None else id
        super().__init__(f"line {number}: {message}")


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A valid line as a request. `fields`: further arguments of `Session.generate_all`."""

    id: LineId
    number: int
    prompt: LinePrompt
    sampling: Sampling
    fields: dict[str, Any] = field(default_factory=dict)
    has_max_tokens: bool = field(default=False, compare=False)  # the line itself sets max_tokens


def parse_line(
    number: int, raw: bytes, defaults: Sampling, given: frozenset[str] = frozenset()
) -> LineRequest:
    """Parse one line. `defaults` supply the sampling parameters that it omits. Raises LineError.

    `given`: the names of the defaults that the user chose. A line with a `body` that sets no
    temperature has the user's, if chosen, or else OpenAI's default of 1.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(number, f"longer than {MAX_LINE_BYTES >> 20} MiB")
    plain = _decode(number, raw)
    own_id = _id_of(plain)  # read first: an error of another field should name the id
    try:
        if "body" in plain or "custom_id" in plain:
            return _batch_request(number, plain, defaults, given)
        return _plain_request(number, _convert(plain, PlainLine), defaults)
    except (ValueError, RecursionError) as error:
        raise LineError(number, str(error), own_id) from None


def _decode(number: int, raw: bytes) -> dict[str, Any]:
    try:
        plain = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:  # deep nesting raises RecursionError
        raise LineError(number, str(error)) from None
    if not isinstance(plain, dict):
        raise LineError(number, "expected an object: {...}")
    return plain


def _id_of(plain: dict[str, Any]) -> LineId | None:
    found = plain.get("custom_id", plain.get("id"))
    # bool is a subclass of int, but `true` is no id.
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _convert(plain: Any, schema: type[Any], where: str = "") -> Any:
    """Convert `plain` to `schema`. Raises ValueError, with the closest name for an unknown field.

    `where`: a prefix for field names in errors.
    """
    known: tuple[str, ...] = schema.__struct_fields__
    for name in plain if isinstance(plain, dict) else ():
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean `{close}`?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown field `{where}{name}`; {hint}")
    return msgspec.convert(plain, schema, str_keys=True)  # JSON keys of logit_bias are texts


def _plain_request(number: int, line: PlainLine, defaults: Sampling) -> LineRequest:
    sampling_fields = _sampling(line)
    return LineRequest(
        id=number if line.id is UNSET else line.id,
        number=number,
        prompt=_prompt(line),
        sampling=msgspec.structs.replace(
            defaults, **sampling_fields, **_set_fields(line, ("logprobs",))
        ),
        fields=_request_fields(line, PLAIN_FIELDS),
        has_max_tokens="max_tokens" in sampling_fields,
    )


def _batch_request(
    number: int, plain: dict[str, Any], defaults: Sampling, given: frozenset[str]
) -> LineRequest:
    if "body" in plain:  # converted alone first, so that an unknown field is called `body.FIELD`
        _convert(plain["body"], BatchBody, "body.")
    line: BatchLine = _convert(plain, BatchLine)
    body = line.body
    _check_url(line)
    sampling_fields = ({} if "temperature" in given else {"temperature": 1.0}) | _sampling(body)
    if body.max_completion_tokens is not UNSET:
        sampling_fields["max_tokens"] = body.max_completion_tokens
    user = {} if body.user is UNSET else {"user_id": body.user}
    return LineRequest(
        id=line.custom_id,
        number=number,
        prompt=_prompt(body),
        sampling=msgspec.structs.replace(defaults, **sampling_fields, logprobs=_num_logprobs(body)),
        fields=_request_fields(body, ("model",)) | user,
        has_max_tokens="max_tokens" in sampling_fields,
    )


def _check_url(line: BatchLine) -> None:
    wanted = "/v1/completions" if line.body.messages is UNSET else "/v1/chat/completions"
    if line.url is not UNSET and line.url != wanted:
        raise ValueError(f"a body for {wanted} under the url {line.url}")


def _num_logprobs(body: BatchBody) -> int | None:
    """The number of top logprobs, or None. Raises ValueError.

    A chat has `logprobs: true, top_logprobs: k`, a completion has `logprobs: k`.
    """
    top = body.top_logprobs if isinstance(body.top_logprobs, int) else None
    if body.logprobs is True:
        return top or 0
    if top is not None:
        raise ValueError("`top_logprobs` needs `logprobs`: true")
    return body.logprobs if isinstance(body.logprobs, int) and body.logprobs is not False else None


def _prompt(line: LineFields) -> LinePrompt:
    if (line.prompt is UNSET) == (line.messages is UNSET):
        raise ValueError("give either `prompt` or `messages`")
    if line.messages is not UNSET:
        return [message.plain for message in line.messages]
    if not line.prompt:
        raise ValueError("`prompt` is empty")
    return line.prompt


def _set_fields(line: msgspec.Struct, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(line, name)) is not UNSET}


def _sampling(line: LineFields) -> dict[str, Any]:
    """The fields of Sampling that the line sets. A field with null is not set."""
    shared = tuple(
        name for name in Sampling.__struct_fields__ if name in LineFields.__struct_fields__
    )
    fields = {name: value for name, value in _set_fields(line, shared).items() if value is not None}
    if "stop" in fields:
        fields["stop"] = (
            (fields["stop"],) if isinstance(fields["stop"], str) else tuple(fields["stop"])
        )
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    grammar = _line_grammar(line.grammar, line.response_format, line.structured_outputs)
    return fields if grammar is None else {**fields, "grammar": grammar}


def _request_fields(line: LineFields, names: tuple[str, ...]) -> dict[str, Any]:
    fields = _set_fields(line, (*names, "priority"))
    if isinstance(fields.get("priority"), str):
        fields["priority"] = _priority(fields["priority"])
    return fields


def _priority(name: str) -> int:
    if name not in PRIORITIES:
        raise ValueError(f"unknown priority `{name}`; known are {', '.join(PRIORITIES)}")
    return PRIORITIES[name]


def _line_grammar(
    grammar: Grammar | UnsetType | None,
    response_format: ResponseFormat | UnsetType | None,
    structured_outputs: StructuredOutputs | UnsetType | None,
) -> Grammar | None:
    """The grammar of a line; None for any text. Raises ValueError for two, and for a wrong one."""
    # An unset field is false, and so is null.
    asked = Generation(
        response_format=response_format or None, structured_outputs=structured_outputs or None
    )
    try:
        check_constraints(asked)
        constraint = constraint_of(asked)
        bound = None if constraint is None else grammar_of(constraint, _MAX_DEPTH)
    except ApiError as error:
        raise ValueError(error.message) from None
    if grammar and bound:
        raise ValueError("give one of `grammar`, `response_format` and `structured_outputs`")
    found = grammar or bound
    if not found:
        return None
    try:
        check_grammar(found)
    except GrammarError as error:
        raise ValueError(f"the line's grammar is wrong: {error}") from None
    return found
