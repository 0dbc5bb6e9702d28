"""The fields of a line that bind its answer to a grammar, as bodies of the gateway have them."""

from msgspec import UnsetType

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.request import Generation, ResponseFormat, StructuredOutputs
from sagellm.gateway.protocol.structured_outputs import (
    check_constraints,
    constraint_of,
    grammar_of,
)
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

_MAX_DEPTH = RequestLimits().json_depth


def line_grammar(
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
