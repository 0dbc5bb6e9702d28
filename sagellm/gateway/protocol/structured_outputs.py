"""The grammar that a request binds its answer to, under any of the names that APIs have for it."""

from typing import Any, NamedTuple

import msgspec

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.request import Generation, ResponseFormat, StructuredOutputs
from sagellm.runtime.grammars import choice_grammar, json_object_grammar
from sagellm.runtime.sampling import Grammar

# Field of a request -> the kind of its value, a field of StructuredOutputs.
_ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
}


class Constraint(NamedTuple):
    """A value that binds the answer. `kind`: a field of StructuredOutputs.

    `param`: the place of the value in the request.
    """

    param: str
    kind: str
    value: Any


def check_constraints(asked: Generation) -> None:
    """Raise ApiError (400) for fields that bind the answer twice, or in no complete way."""
    if asked.response_format is not None:
        _check_format(asked.response_format)
    if asked.structured_outputs is not None and len(_parts(asked.structured_outputs)) != 1:
        names = ", ".join(StructuredOutputs.__struct_fields__)
        raise wrong("structured_outputs", f"must have exactly one of {names}")
    constraints = _constraints(asked)
    if len(constraints) > 1:
        first, second = (
            constraints[0].param.partition(".")[0],
            constraints[1].param.partition(".")[0],
        )
        raise wrong(second, f"stands beside `{first}`; give one of them")


def constraint_of(asked: Generation) -> Constraint | None:
    """Return what binds the answer to a request that was checked; None: nothing does."""
    return next(iter(_constraints(asked)), None)


def grammar_of(constraint: Constraint, max_depth: int) -> Grammar:
    """Return the grammar of a constraint, which may be wrong: it is not compiled.

    Raises ApiError (400) for a schema that is given as text and is no JSON object, or has more than
    `max_depth` levels. Takes milliseconds for a value of megabytes.
    """
    match constraint.kind:
        case "json":
            return _schema(constraint, max_depth)
        case "regex":
            return Grammar(kind="regex", text=constraint.value)
        case "grammar":
            return Grammar(kind="lark", text=constraint.value)
        case "choice":
            return choice_grammar(constraint.value)
    return json_object_grammar()


def _check_format(form: ResponseFormat) -> None:
    if form.type == "json_schema" and form.json_schema is None:
        place = "response_format.json_schema"
        raise wrong(place, "is missing", "missing_required_parameter")
    if form.type != "json_schema" and form.json_schema is not None:
        raise wrong("response_format.json_schema", "is only for the type `json_schema`")


def _constraints(asked: Generation) -> list[Constraint]:
    """Return all values that bind the answer, in the order in which errors name them."""
    found = []
    form, outputs = asked.response_format, asked.structured_outputs
    if form is not None and form.json_schema is not None:
        schema = form.json_schema.schema
        found.append(Constraint("response_format.json_schema.schema", "json", schema))
    elif form is not None and form.type == "json_object":
        found.append(Constraint("response_format", "json_object", True))
    if outputs is not None:
        found += _parts(outputs)
    for name, kind in _ALIASES.items():
        if (value := getattr(asked, name)) is not None:
            found.append(Constraint(name, kind, value))
    return found


def _parts(outputs: StructuredOutputs) -> list[Constraint]:
    values = ((name, getattr(outputs, name)) for name in outputs.__struct_fields__)
    return [
        Constraint(f"structured_outputs.{name}", name, value)
        for name, value in values
        if value is not None and value is not False
    ]


def _schema(constraint: Constraint, max_depth: int) -> Grammar:
    """Return the grammar of a JSON schema, which is given as an object or as text."""
    # The text is written again: what was read strictly must not be read in another way later.
    value = constraint.value
    schema = value if isinstance(value, dict) else _read_schema(constraint.param, value, max_depth)
    return Grammar(kind="json_schema", text=msgspec.json.encode(schema).decode())


def _read_schema(param: str, text: str, max_depth: int) -> dict[str, Any]:
    try:
        schema = read_json(text.encode(), max_depth=max_depth)
    except ApiError:
        schema = None
    if not isinstance(schema, dict):
        raise wrong(param, "must be a JSON schema, or the JSON text of one")
    return schema
