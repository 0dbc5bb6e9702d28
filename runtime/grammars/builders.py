"""Grammars that are made here: any JSON object, and a choice of texts."""

from collections.abc import Sequence

import msgspec

from sagellm.runtime.sampling import Grammar


def json_object_grammar() -> Grammar:
    """The grammar of any JSON object."""
    return Grammar(kind="json_schema", text='{"type":"object"}')


def choice_grammar(texts: Sequence[str]) -> Grammar:
    """The grammar of an answer that is one of `texts`. Raises ValueError without any text."""
    if not texts:
        raise ValueError("a choice needs at least one text")
    options = " | ".join(msgspec.json.encode(text).decode() for text in texts)
    return Grammar(kind="lark", text=f"start: {options}\n")
