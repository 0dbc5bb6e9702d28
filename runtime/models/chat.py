"""Chat templates: the model's own Jinja text, rendered in Jinja's sandbox."""

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from sagellm.runtime.models import ModelError, TextError
from sagellm.runtime.models.helper_process import (
    EncodeWork,
    HelperJob,
    JobWorker,
    RenderedText,
    RenderWork,
    TemplateJob,
)

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

# Imported at the first chat: plain prompts need no template.
NEEDS = _SANDBOX, _META = "jinja2.sandbox", "jinja2.meta"

TEMPLATE_FILE = "chat_template.jinja"

MAX_TEMPLATE_BYTES = 128 << 10  # five times the longest template of published models

Scalar: TypeAlias = bool | int | float | str

# Variables that every template receives. No caller may set them.
RESERVED_VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "chat_template", "bos_token", "eos_token", "unk_token", "pad_token"),
    }
)
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of the final message, as in transformers
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none\b")


@dataclass(frozen=True, slots=True)
class Rendering:
    """The options with which messages are rendered to a prompt.

    `continue_final_message`: the prompt ends inside the last message, whose content must be text;
    `add_generation_prompt` must then be False. `tools`: passed to the template. `variables`:
    further names that the template may read; none of them is in RESERVED_VARIABLES.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Scalar] = field(default_factory=dict)


DEFAULT_RENDERING = Rendering()  # the prompt ends where the model's next message begins


class ChatTemplateError(TextError):
    """The model's template refused a conversation, or is broken."""


def _raise_exception(message: str) -> NoReturn:
    error: type[Exception] = importlib.import_module("jinja2").TemplateError
    raise error(message)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> "ImmutableSandboxedEnvironment":
    """The environment that transformers gives a template: block trimming, filters and functions."""
    make: type[ImmutableSandboxedEnvironment]
    make = importlib.import_module(_SANDBOX).ImmutableSandboxedEnvironment
    environment = make(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One template. It is compiled at the first use, so that plain prompts work even if the
    template is broken.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        self._text = text
        self._special_tokens = dict(special_tokens)

    @cached_property
    def _template(self) -> "jinja2.Template":
        try:
            return _environment().from_string(self._text)
        except Exception as error:  # Jinja computes constants while it compiles: any error may come
            raise ChatTemplateError(f"the chat template is broken: {error}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads, without RESERVED_VARIABLES and globals."""
        environment = _environment()
        try:
            meta = importlib.import_module(_META)
            read = meta.find_undeclared_variables(environment.parse(self._text))
        except Exception:  # a broken template, which `render` reports
            return frozenset()
        return frozenset[str](read) - RESERVED_VARIABLES - environment.globals.keys()

    def render(
        self, messages: Sequence[Mapping[str, Any]], how: Rendering = DEFAULT_RENDERING
    ) -> str:
        """Render the prompt of a conversation. Raises ChatTemplateError."""
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
        except Exception as error:  # attributes, filters and operators raise any type
            cause = str(error) or type(error).__name__
            raise ChatTemplateError(f"the chat template refused the messages: {cause}") from error
        _check_unicode(text)
        return _up_to_final(text, messages[-1]["content"]) if how.continue_final_message else text

    def _given(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message for the template. A message with tool calls may have the content None. Many
        templates expect a text, so None becomes "", unless the template itself tests for none.
        """
        given = dict(message)
        if given.get("content", "") is None and not _ASKS_FOR_NONE.search(self._text):
            given["content"] = ""
        return given


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ChatTemplateError if there are no messages."""
    if not messages:
        raise ChatTemplateError("the conversation is empty; give at least one message")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatTemplateError("the chat template made a text that is not Unicode") from error


def _up_to_final(text: str, final: str) -> str:
    """Cut `text` at the end of its final message. If the template strips messages, the message
    stays stripped at its end.
    """
    if final.strip() not in text or _CONTINUED.strip() not in text:
        raise ChatTemplateError("the chat template does not show the end of the final message")
    end = text.rindex(_CONTINUED.strip())
    is_whole = text.startswith(_CONTINUED, end)  # False: the template strips the end of messages
    return text[:end] if is_whole else text[:end].rstrip()


def find_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The text of the default template, from chat_template.jinja or tokenizer_config.json.

    Raises ModelError if the template is too long, or not UTF-8.
    """
    file = path / TEMPLATE_FILE
    if file.is_file():
        return _read_text(file)
    given = tokenizer_config.get("chat_template")
    if isinstance(given, list):  # several named templates
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
    """Encode a conversation for a helper process. Raises ChatTemplateError.

    The format is JSON, because it keeps the order of fields, large integers and lone surrogates.
    """
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
    """The messages and options of a packed conversation."""
    messages, options = json.loads(given)
    return messages, Rendering(**{**options, "tools": tuple(options["tools"])})


def _as_dict(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role ("bos_token"). The configuration has each as a text, or as
    {"content": text}.
    """
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found


class _RenderWorker:
    """Renders one template, in a helper process. Implements JobWorker."""

    def __init__(self, job: TemplateJob) -> None:
        self._template = ChatTemplate(job.text, job.special_tokens)
        self.variables = tuple(sorted(self._template.variables))

    def answer(self, work: RenderWork | EncodeWork) -> RenderedText:
        assert isinstance(work, RenderWork)
        return RenderedText(self._template.render(*unpack_conversation(work.given)))


def open_job(job: HelperJob) -> JobWorker:
    """Compile the template of a job. Called in a helper process."""
    assert isinstance(job, TemplateJob)
    return _RenderWorker(job)
