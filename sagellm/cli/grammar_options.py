"""The options of `run`, `complete` and `chat` that bind an answer to a grammar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from sagellm.cli.errors import Failure
from sagellm.runtime.grammars import choice_grammar
from sagellm.runtime.sampling import Grammar


@Parameter(name="*", group="What the answer may be")
@dataclass(frozen=True, kw_only=True)
class GrammarOptions:
    """The form of an answer. At most one option is given."""

    json_schema: str | None = None
    """The answer is JSON of this JSON schema: a file, or the schema itself."""

    regex: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """The answer matches this regular expression."""

    choice: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = ()
    """The answer is one of these texts; repeat the option for each."""

    grammar: Path | None = None
    """The answer belongs to the grammar of this file, in llguidance's dialect of Lark."""

    @property
    def named(self) -> tuple[str, Grammar] | None:
        """The given option and its grammar, unchecked; None without one. Raises Failure."""
        given = {
            "--json-schema": self.json_schema,
            "--regex": self.regex,
            "--choice": self.choice or None,
            "--grammar": self.grammar,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise Failure(f"{' and '.join(names)} exclude each other", "give one of them")
        return (names[0], self._grammar) if names else None

    @property
    def fields(self) -> dict[str, Any]:
        """The option as an argument of a client's call. Raises Failure.

        The server checks the grammar: servers differ in what they take.
        """
        named = self.named
        if named is None:
            return {}
        grammar = named[1]
        if grammar.kind == "json_schema":
            schema = {"name": "answer", "schema": msgspec.json.decode(grammar.text)}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if self.choice:
            return {"choices": self.choice}
        return {"regex" if grammar.kind == "regex" else "grammar": grammar.text}

    @property
    def _grammar(self) -> Grammar:
        if self.json_schema is not None:
            return Grammar(kind="json_schema", text=_schema_text(self.json_schema))
        if self.regex is not None:
            return Grammar(kind="regex", text=self.regex)
        if self.choice:
            return choice_grammar(self.choice)
        return Grammar(kind="lark", text=_file_text(str(self.grammar), "--grammar"))


def _schema_text(given: str) -> str:
    """The JSON text of a schema, from a file or as it is given. Raises Failure."""
    text = given if given.lstrip().startswith("{") else _file_text(given, "--json-schema")
    try:
        schema = msgspec.json.decode(text)
    except ValueError as error:
        fix = "give a JSON object, or a file of one"
        raise Failure(f"the schema is no JSON: {error}", fix, "--json-schema") from None
    if not isinstance(schema, dict):
        fix = "give an object: {...}"
        raise Failure("the schema is no JSON object", fix, "--json-schema")
    return msgspec.json.encode(schema).decode()


def _file_text(name: str, option: str) -> str:
    """The contents of a file. Raises Failure for one that cannot be read, or is not UTF-8."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Failure(f"{name} cannot be read: {cause}", "give a file of text", option) from None
