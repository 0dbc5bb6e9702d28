"""The request bodies of completions, chats, /tokenize and /detokenize."""

import re
from typing import Annotated, Any, TypeAlias, TypeVar, get_args

import msgspec
from msgspec import Meta

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.chat_messages import (
    ConversationMessage,
    Role,
    Variables,
    check_conversation,
    plain_messages,
    read_messages,
)
from sagellm.gateway.protocol.json import fields_of, read_json
from sagellm.gateway.protocol.other_apis import CHAT, COMPLETION, REQUEST
from sagellm.gateway.protocol.request import (
    Effort,
    Generation,
    NonEmptyText,
    TokenId,
    TruncationSide,
    at_most,
    check_generation,
    check_model_name,
    known_fields,
)
from sagellm.gateway.protocol.structured_outputs import check_constraints
from sagellm.gateway.protocol.tool_choice import (
    Tool,
    ToolChoice,
    ToolMode,
    Tools,
    check_tools,
    offered_tools,
    read_tool_choice,
    read_tools,
)
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.sampling import MAX_LOGPROBS, RANGES

T = TypeVar("T")

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_CHOICES = {
    "role": get_args(Role),
    "reasoning_effort": get_args(Effort),
    "truncation_side": get_args(TruncationSide),
    "encoding_format": ("float", "base64"),
    "type": ("text",),
    "tool_choice": get_args(ToolMode),
    "tool_choice.type": ("function", "allowed_tools"),
    "tool_choice.allowed_tools.mode": ("auto", "required"),
    "response_format.type": ("text", "json_object", "json_schema"),
}
_STEP = re.compile(r"\.?(\w+)|\[(\d+)\]")


def convert(plain: dict[str, Any], struct: type[T]) -> T:
    """Convert plain values to `struct`, with types and ranges checked.

    Raises ApiError (400), whose message contains no text of the body.
    """
    try:
        return msgspec.convert(plain, struct)
    except msgspec.ValidationError as error:
        fault = str(error)
    # Raised outside `except`: otherwise the error's context would hold the body.
    raise _refusal(fault, plain)


def _refusal(fault: str, plain: dict[str, Any]) -> ApiError:
    """Return the error for a message of msgspec, with the field in `param`."""
    place = _PLACE.search(fault)
    param = place.group(1).removesuffix("[...]") if place else ""
    what = _PLACE.sub("", fault)
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing.group(1)}".lstrip(".")
        return wrong(param, "is missing", "missing_required_parameter")
    if what.startswith(("Invalid enum value", "Invalid value")):
        # msgspec's message ends with the value, which is the client's text: do not show it.
        return wrong(param, f"must be one of {', '.join(_choices(param))}")
    return wrong(param, _number(param, plain) + what[:1].lower() + what[1:])


def _choices(param: str) -> tuple[str, ...]:
    """Return the allowed values of a field that takes one of several words."""
    leaf = param.rpartition(".")[2]
    if param in _CHOICES or leaf != "type" or "tool" not in param:
        return _CHOICES.get(param) or _CHOICES[leaf]
    return ("function",)


def _number(param: str, plain: Any) -> str:
    """Return "is 17; " if the field `param` is the number 17; "" if it is no number."""
    for name, index in _STEP.findall(param):
        step = int(index) if index else name
        if isinstance(plain, dict | list) and _has(plain, step):
            plain = plain[step]
        else:
            return ""
    is_number = isinstance(plain, int | float) and not isinstance(plain, bool)
    return f"is {plain}; " if is_number else ""


def _has(plain: dict[str, Any] | list[Any], step: str | int) -> bool:
    if isinstance(plain, list):
        return isinstance(step, int) and step < len(plain)
    return step in plain


TokenIds: TypeAlias = Annotated[list[TokenId], Meta(min_length=1)]
# A list must be all texts, all ids, or all lists of ids. No type can express this, so
# `_check_prompt` checks it.
PromptField: TypeAlias = (
    NonEmptyText | Annotated[list[NonEmptyText | TokenId | TokenIds], Meta(min_length=1)]
)


class CompletionRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a completion.

    `logprobs` k asks for those of the answer's tokens and of the k most likely ones, with `echo`
    for those of the prompt as well. With `echo`, `max_tokens` may be 0: the answer is the prompt.
    """

    prompt: PromptField
    max_tokens: Annotated[int, Meta(ge=0, le=RANGES["max_tokens"][1])] | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None  # 1, or `n`: then nothing is left to choose
    add_special_tokens: bool = True

    @property
    def is_prompt_only(self) -> bool:
        """Whether the answer is only an echo of the prompt."""
        return self.echo and self.asked_tokens == 0

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (_ids(self.prompt),)
        return tuple(one if isinstance(one, str) else _ids(one) for one in self.prompt)


def read_completion(body: bytes, limits: RequestLimits) -> CompletionRequest:
    """Read a completion's body. Raises ApiError (400). The model's limits are checked later."""
    value = read_json(body, max_depth=limits.json_depth)
    request = convert(known_fields(value, CompletionRequest, COMPLETION), CompletionRequest)
    check_generation(request, limits)
    if request.is_structured:
        check_constraints(request)
    _check_prompt(request.prompt, limits)
    if request.asked_tokens == 0 and not request.echo:
        raise wrong("max_tokens", "is 0; it must be 1 or more, or `echo` must be true")
    if request.best_of not in (None, 1, request.n):
        raise wrong("best_of", f"is {request.best_of}; only the value of n ({request.n}) is served")
    return request


def _ids(prompt: Any) -> tuple[int, ...]:
    return tuple(prompt)


def _check_prompt(prompt: str | list[Any], limits: RequestLimits) -> None:
    if isinstance(prompt, str):
        return
    kinds = {type(one) for one in prompt}
    if len(kinds) > 1:
        raise wrong("prompt", "mixes text, token ids and lists of them; use one kind")
    if int not in kinds:
        at_most("prompt", len(prompt), limits.num_prompts, "prompts")


class ChatRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a chat.

    `logprobs` asks for those of the answer's tokens, `top_logprobs` k for those of the k most
    likely as well. Without `include_reasoning`, the answer has no reasoning.
    """

    messages: Annotated[list[ConversationMessage], Meta(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = False  # in addition to the template's own
    reasoning_effort: Effort | None = None
    tools: Tools = msgspec.field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    add_generation_prompt: bool | None = None  # None: unless the final message goes on
    continue_final_message: bool = False
    chat_template_kwargs: Variables = msgspec.field(default_factory=dict)

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model sees."""
        return offered_tools(self.tools, self.tool_choice) if self.tools else []

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages in the form that chat templates take."""
        return plain_messages(self)


def read_chat(body: bytes, limits: RequestLimits) -> ChatRequest:
    """Read a chat's body. Raises ApiError (400). The model's limits are checked later."""
    return chat_request(read_json(body, max_depth=limits.json_depth), limits)


def chat_request(value: Any, limits: RequestLimits) -> ChatRequest:
    """Return the chat of a body that was parsed. Raises ApiError (400), as `read_chat`."""
    said = known_fields(value, ChatRequest, CHAT)
    if "messages" in said:
        said["messages"] = read_messages(said["messages"], limits)
    if "tools" in said:
        said["tools"] = read_tools(said["tools"])
    if "tool_choice" in said:
        said["tool_choice"] = read_tool_choice(said["tool_choice"])
    request = convert(said, ChatRequest)
    check_generation(request, limits)
    if request.is_structured:
        check_constraints(request)
    check_conversation(request)
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", "needs `logprobs`: true")
    if request.tools or request.tool_choice is not None:
        check_tools(request.tools, request.tool_choice)
    return request


class TokenizePrompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to count and cut. `return_token_strs` asks for each token as text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to render, count and cut, as a chat would."""

    messages: Annotated[list[ConversationMessage], Meta(min_length=1)]
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False
    tools: Tools = []
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Variables = {}

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model sees."""
        return self.tools

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages in the form that chat templates take."""
        return plain_messages(self)


TokenizeRequest: TypeAlias = TokenizePrompt | TokenizeChat


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids to turn into text."""

    tokens: list[TokenId]
    model: str | None = None


def read_tokenize(body: bytes, limits: RequestLimits) -> TokenizeRequest:
    """Read a body of /tokenize, which has `messages` or a `prompt`. Raises ApiError (400)."""
    value = read_json(body, max_depth=limits.json_depth)
    struct = _form_of(value)
    said = fields_of(value, struct.__struct_fields__, REQUEST)
    if "messages" in said:
        said["messages"] = read_messages(said["messages"], limits)
    if "tools" in said:
        said["tools"] = read_tools(said["tools"])
    request = convert(said, struct)
    check_model_name(request.model, limits)
    if isinstance(request, TokenizeChat):
        check_conversation(request)
    return request


def read_detokenize(body: bytes, limits: RequestLimits) -> DetokenizeRequest:
    """Read a body of /detokenize. Raises ApiError (400). The vocabulary is checked later."""
    value = read_json(body, max_depth=limits.json_depth)
    said = fields_of(value, DetokenizeRequest.__struct_fields__, REQUEST)
    request = convert(said, DetokenizeRequest)
    check_model_name(request.model, limits)
    return request


def _form_of(value: Any) -> type[TokenizeRequest]:
    """Return the type of a body of /tokenize: a text or a conversation.

    Remove the other field from `value` if it is null. Raises ApiError (400) if both are given.
    """
    if not isinstance(value, dict):
        return TokenizePrompt
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) == 2:
        raise wrong("prompt", "stands beside `messages`; give one of them")
    for name in {"prompt", "messages"}.difference(given):
        value.pop(name, None)
    return TokenizeChat if given == ["messages"] else TokenizePrompt
