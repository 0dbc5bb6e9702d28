"""Chat templates: the model's own Jinja text, rendered in a sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sagellm.runtime.models import ModelError, TextError

TEMPLATE_FILE = "chat_template.jinja"

MAX_TEMPLATE_BYTES = 128 << 10  # the longest of published models have a fifth of it

Scalar: TypeAlias = bool | int | float | str

# What a template is given by us: no caller may give it another value.
RESERVED_VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "chat_template", "bos_token", "eos_token", "unk_token", "pad_token"),
    }
)
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none\b")


@dataclass(frozen=True, slots=True)
class Rendering:
    """How messages become a prompt.

    `continue_final_message`: the prompt ends inside the last message, whose content is text; then
    `add_generation_prompt` is False. `tools` are shown to the model as the template has it.
    `variables`: further names that the template may read, none of which is in GIVEN.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Scalar] = field(default_factory=dict)


DEFAULT_RENDERING = Rendering()  # the prompt of the next message


class ChatTemplateError(TextError):
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
        except Exception as error:  # constants are computed while it is compiled
            raise ChatTemplateError(f"the chat template is broken: {error}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that it reads, but for those that it is given in any case."""
        environment = _environment()
        try:
            read = jinja2.meta.find_undeclared_variables(environment.parse(self._text))
        except Exception:  # as above
            return frozenset()
        return frozenset(read) - RESERVED_VARIABLES - environment.globals.keys()

    def render(
        self, messages: Sequence[Mapping[str, Any]], how: Rendering = DEFAULT_RENDERING
    ) -> str:
        """The prompt of a conversation. Raises ChatTemplateError."""
        check_messages(messages)
        given = [self._given(message) for message in messages]
        if how.continue_final_message:
            given[-1]["content"] += _CONTINUED
        template = self._template
        try:
            text = template.render(
                **how.variables,
                messages=given,
                add_generation_prompt=how.add_generation_prompt,
                tools=[dict(tool) for tool in how.tools] or None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # whatever an attribute, a filter or an operator raises
            cause = str(error) or type(error).__name__
            raise ChatTemplateError(f"the chat template refused the messages: {cause}") from error
        _check_unicode(text)
        return _up_to_final(text, messages[-1]["content"]) if how.continue_final_message else text

    def _given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message of tool calls may have no content: many templates take that for a text, so it
        is one, unless the template asks for none.
        """
        given = dict(message)
        if given.get("content", "") is None and not _ASKS_FOR_NONE.search(self._text):
            given["content"] = ""
        return given


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ChatTemplateError where there are none."""
    if not messages:
        raise ChatTemplateError("the conversation is empty; give at least one message")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatTemplateError("the chat template made a text that is not Unicode") from error


def _up_to_final(text: str, final: str) -> str:
    """The text up to the end of its final message; spaces that the template took off stay off."""
    if final.strip() not in text or _CONTINUED.strip() not in text:
        raise ChatTemplateError("the chat template does not show the end of the final message")
    end = text.rindex(_CONTINUED.strip())
    is_whole = text.startswith(_CONTINUED, end)
    return text[:end] if is_whole else text[:end].rstrip()


def find_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The text of the default template: chat_template.jinja, or in tokenizer_config.json.

    Raises ModelError where it is too long, or not UTF-8.
    """
    file = path / TEMPLATE_FILE
    if file.is_file():
        return _read_text(file)
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):
        named = (entry for entry in given if isinstance(entry, dict))
        given = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if not isinstance(given, str):
        return None
    if len(given) > MAX_TEMPLATE_BYTES:
        raise _too_long(path / "tokenizer_config.json", len(given))
    return given


def _too_long(file: Path, length: int) -> ModelError:
    cause = f"{file} has a chat template of {length} bytes; at most {MAX_TEMPLATE_BYTES} are read"
    return ModelError(cause, "see that it is the template that the model was published with")


def _read_text(file: Path) -> str:
    if (length := file.stat().st_size) > MAX_TEMPLATE_BYTES:
        raise _too_long(file, length)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8: {error}; download it again") from error


def pack_conversation(messages: Sequence[Mapping[str, Any]], how: Rendering) -> bytes:
    """A conversation as JSON, which keeps the order of fields, large integers and surrogates."""
    options = {
        "add_generation_prompt": how.add_generation_prompt,
        "continue_final_message": how.continue_final_message,
        "tools": how.tools,
        "variables": how.variables,
    }
    try:
        return json.dumps((list(messages), options), default=_as_dict).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"the messages are not JSON: {error}") from error


def unpack_conversation(given: bytes) -> tuple[list[dict[str, Any]], Rendering]:
    messages, options = json.loads(given)
    return messages, Rendering(**{**options, "tools": tuple(options["tools"])})


def _as_dict(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
