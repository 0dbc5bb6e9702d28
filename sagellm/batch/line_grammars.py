"""The fields of a line that bind its answer to a grammar, as in the OpenAI API and in vLLM."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.builders import choice_grammar, json_object_grammar
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar


class LineSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema. The other fields are labels."""

    schema: dict[str, Any]
    name: str = ""
    description: str = ""
    strict: bool | None = None


class LineFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `response_format` of the OpenAI API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: LineSchema | UnsetType = UNSET

    @property
    def grammar(self) -> Grammar | None:
        """The grammar of the format; None for any text. Raises ValueError."""
        if (self.type == "json_schema") != isinstance(self.json_schema, LineSchema):
            raise ValueError("`response_format.json_schema` belongs to the type json_schema")
        if isinstance(self.json_schema, LineSchema):
            return schema_grammar(self.json_schema.schema)
        return json_object_grammar() if self.type == "json_object" else None


class LineOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `structured_outputs` of vLLM: one of its fields is given."""

    json: dict[str, Any] | UnsetType = UNSET
    regex: str | UnsetType = UNSET
    choice: Annotated[list[str], Meta(min_length=1)] | UnsetType = UNSET
    grammar: str | UnsetType = UNSET

    @property
    def bound(self) -> Grammar:
        """The grammar of the field. Raises ValueError unless exactly one is given."""
        found: list[Grammar] = []
        if self.json is not UNSET:
            found.append(schema_grammar(self.json))
        if self.regex is not UNSET:
            found.append(Grammar(kind="regex", text=self.regex))
        if self.choice is not UNSET:
            found.append(choice_grammar(self.choice))
        if self.grammar is not UNSET:
            found.append(Grammar(kind="lark", text=self.grammar))
        if len(found) != 1:
            raise ValueError("`structured_outputs` takes one of json, regex, choice, grammar")
        return found[0]


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    """The grammar of a JSON schema."""
    return Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())


def line_grammar(
    grammar: Grammar | UnsetType | None,
    response_format: LineFormat | UnsetType | None,
    structured_outputs: LineOutputs | UnsetType | None,
) -> Grammar | None:
    """The grammar of a line; None for any text. Raises ValueError for two, and for a wrong one."""
    found = [grammar] if isinstance(grammar, Grammar) else []
    if isinstance(response_format, LineFormat) and (form := response_format.grammar) is not None:
        found.append(form)
    if isinstance(structured_outputs, LineOutputs):
        found.append(structured_outputs.bound)
    if not found:
        return None
    if len(found) > 1:
        raise ValueError("give one of `grammar`, `response_format` and `structured_outputs`")
    try:
        check_grammar(found[0])
    except GrammarError as error:
        raise ValueError(f"the line's grammar is wrong: {error}") from None
    return found[0]
