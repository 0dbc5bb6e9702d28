"""Grammars: from the text of a schema, an expression or a grammar to the tokens that may follow."""

import importlib
import re
from collections.abc import Sequence

from sagellm.runtime.sampling import Grammar

# Imported by name at the first grammar: most programs answer without one.
COMPILER = "sagellm.runtime.grammars.grammar_compiler"

# What has a meaning in a regular expression. Characters of other scripts must not be escaped.
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/\x00-\x20]")


class GrammarError(ValueError):
    """A grammar cannot be used. The message gives the reason, and is safe to show to the client: it
    has no text of the grammar but keywords of JSON schema, and property names that are plain words.
    """


def json_object_grammar() -> Grammar:
    """The grammar of any JSON object."""
    return Grammar(kind="json_schema", text='{"type":"object"}')


def choice_grammar(texts: Sequence[str]) -> Grammar:
    """The grammar of an answer that is one of `texts`. Raises ValueError without any text."""
    if not texts:
        raise ValueError("a choice needs at least one text")
    return Grammar(kind="regex", text="|".join(map(_quoted, texts)))


def _quoted(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"\\x{ord(found[0]):02X}", text)


def check_grammar(grammar: Grammar) -> None:
    """Raise GrammarError if a grammar cannot be used: see `grammar_compiler.check_grammar`."""
    importlib.import_module(COMPILER).check_grammar(grammar)
