"""/tokenize and /detokenize, as vLLM has them: a text or a conversation to ids, and ids to text."""

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from sagellm.gateway.errors import wrong
from sagellm.gateway.protocol.conversation import (
    Message,
    Tools,
    Variables,
    check_conversation,
    plain_messages,
    read_messages,
)
from sagellm.gateway.protocol.convert import convert
from sagellm.gateway.protocol.fields import fields_of
from sagellm.gateway.protocol.foreign import REQUEST
from sagellm.gateway.protocol.json import read_json
from sagellm.gateway.protocol.request import TokenId, check_model_name, read_fields
from sagellm.gateway.settings import Limits


class TokenizePrompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A text to count and cut. `return_token_strs` asks for each token as text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation to render, count and cut, as a chat would."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False
    tools: Tools = []
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Variables = {}

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return plain_messages(self)


TokenizeRequest: TypeAlias = TokenizePrompt | TokenizeChat


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids to turn into text."""

    tokens: list[TokenId]
    model: str | None = None


def read_tokenize(body: bytes, limits: Limits) -> TokenizeRequest:
    """The form with `messages` where they are given. Raises ApiError (400)."""
    value = read_json(body, max_depth=limits.json_depth)
    struct = _form_of(value)
    said = fields_of(value, struct.__struct_fields__, REQUEST)
    if "messages" in said:
        said["messages"] = read_messages(said["messages"], limits)
    request = convert(said, struct)
    check_model_name(request.model, limits)
    if isinstance(request, TokenizeChat):
        check_conversation(request, limits)
    return request


def read_detokenize(body: bytes, limits: Limits) -> DetokenizeRequest:
    """Raises ApiError (400); whether the model knows the ids is not checked yet."""
    said = read_fields(body, DetokenizeRequest, limits)
    request = convert(said, DetokenizeRequest)
    check_model_name(request.model, limits)
    return request


def _form_of(value: Any) -> type[TokenizeRequest]:
    """Which of the two it is. Takes what is null of `prompt` and `messages` away."""
    if not isinstance(value, dict):
        return TokenizePrompt
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) == 2:
        raise wrong("prompt", "stands beside `messages`; give one of them")
    for name in {"prompt", "messages"}.difference(given):
        value.pop(name, None)
    return TokenizeChat if given == ["messages"] else TokenizePrompt
