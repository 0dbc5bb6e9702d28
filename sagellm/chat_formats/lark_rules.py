"""Texts of grammars in llguidance's dialect of Lark.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Sequence

from sagellm.chat_formats.answer_readers import ReasoningTags
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse, UnboundSchema
from sagellm.chat_formats.tool_schema import (
    OBJECT_KEYWORDS,
    Member,
    ToolSchema,
    check_bound,
    check_shape,
    closed,
    loosened,
    members_of,
    schema_of,
)
from sagellm.runtime.sampling import Grammar

ANY_TEXT = "/(?s:.*)/"
_MAX_CHARS = 128 << 10  # no engine takes a longer grammar


class Rules:
    """Collects the rules of arguments. Arguments may share a schema, and each repeats its text."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._num_chars = 0

    def append(self, rule: str) -> None:
        """Add a whole rule. Raises UnboundSchema if the rules become too long."""
        self.lines.append(rule)
        self._num_chars += len(rule)
        if self._num_chars > _MAX_CHARS:
            raise UnboundSchema(f"the rules of arguments are longer than {_MAX_CHARS >> 10} KiB")

    def new_name(self) -> str:
        """Return a name for the next rule."""
        return f"rule_{len(self.lines)}"

    def add(self, right: str) -> str:
        """Add a rule of this right side, and return its name."""
        name = self.new_name()
        self.append(f"{name}: {right}")
        return name


def members(
    required: Sequence[str], optional: Sequence[str], rules: Rules, comma: str = ","
) -> str:
    """The members of an object in their order, each the name of a rule. Adds to `rules`."""
    between = literal(comma)
    if required:
        return " ".join(
            [f" {between} ".join(required), *(f"({between} {name})?" for name in optional)]
        )
    if not optional:
        return ""
    first = rest = ""  # rules: the members from this one on, and those after a comma
    for name in reversed(optional):  # one rule with all choices would be quadratic
        first = rules.add(f"{name} {rest} | {first}" if first else name)
        rest = rules.add(f"({between} {name})? {rest}".rstrip())
    return f"{first}?"


def literal(text: str) -> str:
    """A text that the answer has as it is; "" for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def marker(text: str, special_tokens: SpecialTokens) -> str:
    """A tag: the special token of that text, or the text if the tokenizer has no such token."""
    token_id = special_tokens.get(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"


def arguments(tool: ToolSpec) -> str:
    """The arguments of a tool as JSON."""
    return inline_json(schema_of(tool), is_strict=tool.strict)


def inline_json(schema: ToolSchema, *, is_strict: bool) -> str:
    """A JSON value. If not `is_strict`, keywords that no grammar can express are left out."""
    bound = closed(schema if is_strict else loosened(schema))
    return "%json " + json.dumps(bound, ensure_ascii=False)


def arguments_of(tool: ToolSpec, unwritable: re.Pattern[str]) -> list[Member]:
    """The arguments of a tool in a form of its own, required ones first.

    Raises UnboundSchema, also where `unwritable` is found in a name, which the form cannot write.
    """
    schema = schema_of(tool)
    check_bound(tool, schema, OBJECT_KEYWORDS)
    found = members_of(schema, schema)
    if any(not member.name or unwritable.search(member.name) for member in found):
        raise UnboundSchema(
            "an argument has a name that this model's form of calls cannot write; use letters, "
            "digits and `_`"
        )
    return found


def json_call(tool: ToolSpec, member: str) -> str:
    """The JSON object of a call; `member` has the arguments."""
    head = f'{{"name": {literal(tool.name)}, "{member}": '
    return f"{literal(head)} {arguments(tool)} {literal('}')}"


def one_of(use: ToolUse, call: Callable[[ToolSpec], str]) -> str:
    """The rule `call`: a call of any allowed tool. `call`: the text of the call of one tool.

    Raises UnboundSchema for parameters that are no JSON schema.
    """
    for tool in use.allowed:
        check_shape(schema_of(tool))
    rules = [f"call_{number}: {call(tool)}" for number, tool in enumerate(use.allowed)]
    one = " | ".join(f"call_{number}" for number in range(len(rules)))
    return "\n".join([f"call: {one}", *rules])


def start_rules(
    then: str, tags: ReasoningTags | None, prompt: str, special_tokens: SpecialTokens
) -> str:
    """The rule `start`: reasoning if the model may write some, then the rule `then`."""
    if tags is None or tags.is_closed(prompt):
        return f"start: {then}"
    thought = text_up_to("thought_text", tags.closing, special_tokens)
    opening = f"{marker(tags.opening, special_tokens)} {literal(tags.title)}"
    begin = "thought" if tags.is_open(prompt) else f"({opening} thought)?"
    return f"start: {begin} {then}\nthought: thought_text GAP\n{thought}\nGAP: /\\n{{0,2}}/"


def text_up_to(name: str, tag: str, special_tokens: SpecialTokens) -> str:
    """A rule of that name: any text, and the tag that ends it, which the text does not contain."""
    if tag in special_tokens:
        return f"{name}: {ANY_TEXT} {marker(tag, special_tokens)}"
    return f"{name}[suffix={literal(tag)}]: {ANY_TEXT}"


def bounded_text_up_to(
    name: str, tag: str, special_tokens: SpecialTokens, bounds: tuple[int, int | None], end: str
) -> str:
    """Return the rule of `text_up_to` for a bounded number of characters, followed by `end`."""
    least, most = bounds
    text = f"/(?s:.{{{least},{'' if most is None else most}}})/ {literal(end)}"
    if tag in special_tokens:
        return f"{name}: {text} {marker(tag, special_tokens)}"
    terminal = name.upper()
    without_tag = f"~(/(?s:.*)/ {literal(tag)} /(?s:.*)/)"
    return f"{name}[suffix={literal(tag)}]: {terminal}\n{terminal}: ({text}) & {without_tag}"


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
