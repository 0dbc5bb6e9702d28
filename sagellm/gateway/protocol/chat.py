"""/v1/chat/completions: a conversation, answered with one more message."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sagellm.gateway.failure import wrong
from sagellm.gateway.protocol.conversation import (
    Variables,
    check_conversation,
    plain_messages,
)
from sagellm.gateway.protocol.convert import convert
from sagellm.gateway.protocol.messages import Message, read_messages
from sagellm.gateway.protocol.reading import read_fields
from sagellm.gateway.protocol.request import Effort, Generation
from sagellm.gateway.protocol.sizes import check_generation
from sagellm.gateway.protocol.tools import ToolChoice, Tools, check_choice
from sagellm.gateway.settings import Limits
from sagellm.runtime.sampling import MAX_LOGPROBS


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
