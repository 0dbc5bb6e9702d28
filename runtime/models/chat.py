"""Chat templates: the model's own Jinja text, rendered in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sagellm.runtime.models.folder import ModelError

TEMPLATE_FILE = "chat_template.jinja"

# What Python raises for a template's own faults: a wrong call, a missing key, a division by zero.
_RENDERING = (TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class ChatTemplateError(ValueError):
    """A conversation that the model's template does not admit, or a template that is broken."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template: the same block trimming, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One template, compiled when first rendered: a broken one spoils no plain prompts."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self._text = text
        self._special_tokens = dict(special_tokens)

    @cached_property
    def _template(self) -> jinja2.Template:
        try:
            return _environment().from_string(self._text)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template is broken: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. Raises ChatTemplateError."""
        if not messages:
            raise ChatTemplateError("the conversation is empty; give at least one message")
        template = self._template
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, *_RENDERING) as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error


def find_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The text of the default template: chat_template.jinja, or in tokenizer_config.json.

    Raises ModelError where the file is not UTF-8.
    """
    file = path / TEMPLATE_FILE
    if file.is_file():
        return _read_text(file)
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):
        named = (entry for entry in given if isinstance(entry, dict))
        given = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8: {error}; download it again") from error
