"""The text that llguidance is given for a grammar, within limits."""

import json
from typing import NamedTuple

from llguidance import LLMatcher

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import check_regex_cost, regex_cost
from sagellm.runtime.grammars.json_schemas import read_schema, schema_text
from sagellm.runtime.grammars.lark_grammars import from_gbnf, has_gbnf_rules, lark_text
from sagellm.runtime.grammars.reasons import fault_place, reason
from sagellm.runtime.grammars.references import check_levels
from sagellm.runtime.sampling import Grammar

MAX_TEXT_BYTES = 256 << 10
# A forced text is not split as the tokenizer would split it: the model chooses. So a mask depends
# on the bytes of the output alone, and llguidance never calls the tokenizer.
_OPTIONS = '%llguidance {"no_forcing": true}'


class Source(NamedTuple):
    """The text that llguidance compiles. `has_lines`: its lines are those of the client's text.
    `schema`: the client's text, if it is a JSON schema.
    """

    text: str
    has_lines: bool = False
    schema: str = ""

    def fault(self, message: str) -> GrammarError:
        """The error for a message of llguidance, with the place of the fault if that is known."""
        cause = reason(message, has_lines=self.has_lines)
        return GrammarError(f"{cause}{fault_place(self.schema, cause)}" if self.schema else cause)


def llguidance_text(grammar: Grammar) -> Source:
    """The text that llguidance compiles. Raises GrammarError."""
    try:
        if len(grammar.text.encode()) <= MAX_TEXT_BYTES:
            return _TEXTS[grammar.kind](grammar.text)
    except UnicodeEncodeError:
        raise GrammarError("the grammar is not Unicode text") from None
    raise GrammarError(f"the grammar is longer than {MAX_TEXT_BYTES >> 10} KiB")


def _of_schema(text: str) -> Source:
    # The schema is a grammar of its own, because only a grammar in Lark has options.
    start = json.dumps({"name": "start", "lark_grammar": f"start: @schema\n{_OPTIONS}"})
    read = read_schema(text)
    check_levels(read)
    schema = schema_text(read)
    grammars = f'{{"grammars": [{start}, {{"name": "schema", "json_schema": {schema}}}]}}'
    return Source(grammars, schema=text)


def _of_regex(text: str) -> Source:
    check_regex_cost(regex_cost(text))
    found = json.loads(LLMatcher.grammar_from_regex(text))
    return Source(f"{found['grammars'][0]['lark_grammar']}\n{_OPTIONS}")


def _of_lark(text: str) -> Source:
    is_gbnf = has_gbnf_rules(text)
    lark = from_gbnf(text) if is_gbnf else text
    return Source(f"{lark_text(lark)}\n{_OPTIONS}", has_lines=not is_gbnf)


_TEXTS = {"json_schema": _of_schema, "regex": _of_regex, "lark": _of_lark}
