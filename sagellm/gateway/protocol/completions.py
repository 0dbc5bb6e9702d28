"""The bodies of /v1/completions and /v1/chat/completions."""

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.errors import wrong
from sagellm.gateway.protocol.conversation import (
    Message,
    ToolChoice,
    Tools,
    Variables,
    check_choice,
    check_conversation,
    plain_messages,
    read_messages,
)
from sagellm.gateway.protocol.convert import convert
from sagellm.gateway.protocol.request import (
    Effort,
    Generation,
    Text,
    TokenId,
    at_most,
    check_generation,
    read_fields,
)
from sagellm.gateway.settings import Limits
from sagellm.runtime.sampling import MAX_LOGPROBS, RANGES

TokenIds: TypeAlias = Annotated[list[TokenId], Meta(min_length=1)]
# A list is all text, all ids, or all lists of ids; a type cannot say it, `_check_prompt` does.
Prompt: TypeAlias = Text | Annotated[list[Text | TokenId | TokenIds], Meta(min_length=1)]


class CompletionRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a completion. `logprobs` k: those of the chosen and the k most likely tokens,
    with `echo` of the prompt's tokens too. With `echo`, `max_tokens` may be 0: then the answer is
    the prompt, and its logprobs.
    """

    prompt: Prompt
    max_tokens: Annotated[int, Meta(ge=0, le=RANGES["max_tokens"][1])] | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None  # 1, or `n`: then nothing is left to choose
    add_special_tokens: bool = True

    @property
    def is_prompt_only(self) -> bool:
        """Whether nothing is to be generated."""
        return self.echo and self.asked_tokens == 0

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """Each prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (_ids(self.prompt),)
        return tuple(one if isinstance(one, str) else _ids(one) for one in self.prompt)


def read_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """Raises ApiError (400) that names the field; what depends on the model is not checked yet."""
    request = convert(read_fields(body, CompletionRequest, limits), CompletionRequest)
    check_generation(request, limits)
    _check_prompt(request.prompt, limits)
    if request.asked_tokens == 0 and not request.echo:
        raise wrong("max_tokens", "is 0; it must be 1 or more, or `echo` must be true")
    if request.best_of not in (None, 1, request.n):
        raise wrong("best_of", f"is {request.best_of}; only the value of n ({request.n}) is served")
    return request


def _ids(prompt: Any) -> tuple[int, ...]:
    return tuple(prompt)


def _check_prompt(prompt: str | list[Any], limits: Limits) -> None:
    if isinstance(prompt, str):
        return
    kinds = {type(one) for one in prompt}
    if len(kinds) > 1:
        raise wrong("prompt", "mixes text, token ids and lists of them; use one kind")
    if int not in kinds:
        at_most("prompt", len(prompt), limits.num_prompts, "prompts")


class ChatRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a chat. `logprobs` asks for those of the answer's tokens, `top_logprobs` k for
    those of the k most likely as well. `reasoning_effort` is a hint. `tools` are shown to the
    model where `tool_choice` is "none", as vLLM shows them; no tool is ever called.
    """

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = False  # beside those that the template brings
    reasoning_effort: Effort | None = None
    tools: Tools = msgspec.field(default_factory=list)
    tool_choice: ToolChoice | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message goes on
    continue_final_message: bool = False
    chat_template_kwargs: Variables = msgspec.field(default_factory=dict)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return plain_messages(self)


def read_chat(body: bytes, limits: Limits) -> ChatRequest:
    """Raises ApiError (400) that names the field; what depends on the model is not checked yet."""
    said = read_fields(body, ChatRequest, limits)
    if "messages" in said:
        said["messages"] = read_messages(said["messages"], limits)
    check_choice(said)
    request = convert(said, ChatRequest)
    check_generation(request, limits)
    check_conversation(request, limits)
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", "needs `logprobs`: true")
    return request
