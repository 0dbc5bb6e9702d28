"""The forms that a call may ask of its answer, and the fields and readers of each form."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from sagellm.client.exact_schemas import exact_schema_of
from sagellm.client.python_tools import plain_tools
from sagellm.client.responses import BAD_ANSWER, MISUSED, ClientError
from sagellm.client.type_schemas import is_strict, pydantic_type, type_name

ReadValue = Callable[[str], Any]
S = TypeVar("S", bound="Readable")

# Option of a call -> field of `structured_outputs`, as vLLM has them.
_CONSTRAINTS = {"regex": "regex", "choices": "choice", "grammar": "grammar"}
_JSON_FORMATS = ("json_schema", "json_object")
_NO_NAME_CHARACTER = re.compile(r"[^A-Za-z0-9_-]")
_MAX_NAME_LEN = 64  # as in the OpenAI API


class Readable(Protocol):
    """A reply or a stream: it reads its text as a value."""

    read_value: Callable[[str], Any] | None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The options of a call as fields of its body, and the reader of its answer."""

    fields: Mapping[str, Any]
    read_value: ReadValue | None = None

    def bind(self, answer: S) -> S:
        """Give the reader to an answer. Returns the answer."""
        answer.read_value = self.read_value
        for choice in getattr(answer, "choices", ()):
            choice.read_value = self.read_value
        return answer


def read_format(options: Mapping[str, Any], response_format: object = None) -> AnswerFormat:
    """The fields of a call's options. `regex`, `choices` and `grammar` become one field, functions
    among `tools` their descriptions.

    `response_format` is a type or the dict of the OpenAI API. Raises ClientError for a value of
    another kind, and for two forms that exclude each other.
    """
    given = {name: options[name] for name in _CONSTRAINTS if options.get(name) is not None}
    others = ["response_format"] if response_format is not None else []
    if len(names := [*others, *given]) > 1:
        raise _misused(f"{' and '.join(names)} exclude each other; give one of them")
    fields = {name: value for name, value in options.items() if name not in _CONSTRAINTS}
    if given:
        if fields.get("structured_outputs") is not None:
            raise _misused(f"{names[0]} stands beside structured_outputs; give one of them")
        fields["structured_outputs"] = dict(_constraint(name, given[name]) for name in given)
    if fields.get("tools"):
        fields["tools"] = plain_tools(fields["tools"])
    if response_format is None:
        return AnswerFormat(fields)
    fields["response_format"], read_value = _json_format(response_format)
    return AnswerFormat(fields, read_value)


def _constraint(name: str, value: object) -> tuple[str, object]:
    if name == "choices":
        # A text is a sequence too; its letters would be the choices.
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            raise _misused("choices: is no list of texts")
        return _CONSTRAINTS[name], list(value)
    return _CONSTRAINTS[name], value


def _json_format(asked: object) -> tuple[Mapping[str, Any], ReadValue | None]:
    """The field `response_format` of a call, and the reader of the answer."""
    if isinstance(asked, Mapping):
        is_json = asked.get("type") in _JSON_FORMATS
        return asked, reader_of(Any) if is_json else None
    try:
        schema, read_value = exact_schema_of(asked), reader_of(asked)
    except TypeError as error:
        fix = "give a msgspec.Struct, dataclass, TypedDict or pydantic model type, or a dict"
        raise _misused(f"response_format: it cannot be read from JSON ({error}); {fix}") from None
    name = _NO_NAME_CHARACTER.sub("_", type_name(asked))[:_MAX_NAME_LEN]
    named = {"name": name, "schema": schema, "strict": is_strict(schema)}
    return {"type": "json_schema", "json_schema": named}, read_value


def reader_of(kind: Any) -> ReadValue:
    """The function that reads JSON text as a value of a type. It raises ClientError."""
    adapter = pydantic_type(kind)
    read = msgspec.json.Decoder(kind).decode if adapter is None else adapter.validate_json

    def read_value(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:  # the base of the errors of msgspec and pydantic
            cause = f"the answer does not fit {type_name(kind)}: {error}"
            raise ClientError(cause, code=BAD_ANSWER) from error

    return read_value


def _misused(cause: str) -> ClientError:
    return ClientError(cause, code=MISUSED)
