"""What llguidance is given for a grammar, within limits."""

import re

import msgspec
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import gbnf_to_lark

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.sampling import Grammar

MAX_TEXT_BYTES = 128 << 10
# One line break with indentation, or up to two blanks: what pretty-printers and json.dumps write. A
# small model that likes blanks would write them for ever otherwise.
WHITESPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,2}"
LIMITS = LLParserLimits(verbose_errors=False)
# A forced text is not split as the tokenizer would split it: the model chooses. So a mask depends
# on the bytes of the output alone, and llguidance never calls the tokenizer.
_OPTIONS = '%llguidance {"no_forcing": true}'
_GBNF_RULE = re.compile(r"(?m)^\s*[A-Za-z0-9_-]+\s*::=")


def llguidance_text(grammar: Grammar) -> str:
    """The text that llguidance compiles. Raises GrammarError."""
    if len(grammar.text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise GrammarError(f"it is longer than {MAX_TEXT_BYTES >> 10} KiB")
    match grammar.kind:
        case "json_schema":
            return _of_schema(grammar.text)
        case "regex":
            found = msgspec.json.decode(LLMatcher.grammar_from_regex(grammar.text))
            return f"{found['grammars'][0]['lark_grammar']}\n{_OPTIONS}"
        case "lark":
            return f"{_as_lark(grammar.text)}\n{_OPTIONS}"


def _of_schema(text: str) -> str:
    try:
        schema = msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise GrammarError("the schema is not a JSON object") from None
    schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
    start = {"name": "start", "lark_grammar": f"start: @schema\n{_OPTIONS}"}
    grammars = [start, {"name": "schema", "json_schema": schema}]
    return msgspec.json.encode({"grammars": grammars}).decode()


def _as_lark(text: str) -> str:
    if not _GBNF_RULE.search(text):
        return text
    try:
        return gbnf_to_lark(text)
    except Exception:
        raise GrammarError("the grammar in ::= form cannot be read") from None
