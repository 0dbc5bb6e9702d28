"""Texts of grammars in llguidance's dialect of Lark.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sagellm.chat_formats.answer_readers import ReasoningTags
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.runtime.sampling import Grammar

ANY_TEXT = "/(?s:.*)/"
# Models write JSON with or without one space after `,` and `:`. With free white space, a weak model
# may write spaces without end.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def literal(text: str) -> str:
    """A text that the answer has as it is; "" for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def marker(text: str, special_tokens: SpecialTokens) -> str:
    """A tag: the special token of that text, or the text if the tokenizer has no such token."""
    token_id = special_tokens.get(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"


def arguments(tool: ToolSpec) -> str:
    """The arguments of a tool. Only a strict tool may not have a schema with keywords that the
    grammar cannot express; for other tools such keywords are left out.
    """
    schema = {"type": "object", **(tool.parameters or {})}
    options = _JSON_OPTIONS if tool.strict else {**_JSON_OPTIONS, "lenient": True}
    return inline_json({**schema, "x-guidance": options})


def inline_json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(schema, ensure_ascii=False)


def json_call(tool: ToolSpec, member: str) -> str:
    """The JSON object of a call; `member` has the arguments."""
    head = f'{{"name": {literal(tool.name)}, "{member}": '
    return f"{literal(head)} {arguments(tool)} {literal('}')}"


def one_of(use: ToolUse, call: Callable[[ToolSpec], str]) -> str:
    """The rule `call`: a call of any allowed tool. `call`: the text of the call of one tool."""
    rules = [f"call_{number}: {call(tool)}" for number, tool in enumerate(use.allowed)]
    one = " | ".join(f"call_{number}" for number in range(len(rules)))
    return "\n".join([f"call: {one}", *rules])


def start_rules(
    then: str, tags: ReasoningTags | None, prompt: str, special_tokens: SpecialTokens
) -> str:
    """The rule `start`: reasoning if the model may write some, then the rule `then`."""
    if tags is None or tags.is_closed(prompt):
        return f"start: {then}"
    closing = marker(tags.closing, special_tokens)
    if tags.closing in special_tokens:
        thought = f"thought: {ANY_TEXT} {closing} GAP"
    else:
        thought = f"thought: thought_text GAP\nthought_text[suffix={closing}]: {ANY_TEXT}"
    opening = f"({marker(tags.opening, special_tokens)} thought)?"
    begin = "thought" if tags.is_open(prompt) else opening
    return f"start: {begin} {then}\n{thought}\nGAP: /\\n{{0,2}}/"


def response_rules(grammar: Grammar) -> str:
    """The rule `response`: a text of the grammar."""
    if grammar.kind == "json_schema":
        return f"response: %json {grammar.text}"
    if grammar.kind == "regex":
        return f"response: /{_escaped(grammar.text)}/"
    return f"response: %lark {{\n{grammar.text}\n}}"


def _escaped(regex: str) -> str:
    """A regular expression without bare slashes and newlines, which would end it in Lark."""
    bare = {"/": r"\/", "\n": r"\n"}
    return re.sub(r"\\.|[/\n]", lambda found: bare.get(found.group(), found.group()), regex)
