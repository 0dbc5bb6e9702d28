"""What a chat and its tokenisation have in common: messages, and how they become a prompt."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, TypeAlias

from msgspec import Meta

from sagellm.gateway.failure import wrong
from sagellm.gateway.protocol.messages import Message, check_messages
from sagellm.gateway.protocol.names import shown
from sagellm.gateway.protocol.tools import Tool
from sagellm.gateway.settings import Limits
from sagellm.runtime.models.chat import GIVEN, Rendering

MAX_VARIABLES = 32
MAX_VARIABLE_LEN = 512
_LARGEST = 1 << 20  # a template may repeat a text so often

Variable: TypeAlias = (
    bool
    | Annotated[int, Meta(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
    | Annotated[str, Meta(max_length=MAX_VARIABLE_LEN)]
    | None
)
Variables: TypeAlias = Annotated[dict[str, Variable], Meta(max_length=MAX_VARIABLES)]
# Switches that clients send to any model: one whose template does not read them has none.
_SWITCHES = frozenset({"enable_thinking", "thinking"})


class Conversation(Protocol):
    """What is read of a request that has messages."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[Tool]: ...

    @property
    def add_generation_prompt(self) -> bool | None: ...

    @property
    def continue_final_message(self) -> bool: ...

    @property
    def chat_template_kwargs(self) -> Mapping[str, Variable]: ...


def check_conversation(asked: Conversation, limits: Limits) -> None:
    """Raise ApiError (400) for what no model could be asked."""
    check_messages(asked.messages, limits)
    if not asked.continue_final_message:
        return
    if asked.add_generation_prompt:
        raise wrong("add_generation_prompt", "stands beside continue_final_message; give one")
    if asked.messages[-1].content is None:
        raise wrong("continue_final_message", "needs a final message with content")


def plain_messages(asked: Conversation) -> list[dict[str, Any]]:
    """The messages as a chat template takes them."""
    return [message.plain for message in asked.messages]


def rendering_of(asked: Conversation, read: frozenset[str]) -> Rendering:
    """How the model's template, which reads the names `read`, is to render it.

    Raises ApiError (400) for a variable that the template does not read, or may not be given.
    """
    for name in asked.chat_template_kwargs:
        _check_variable(name, read)
    add = asked.add_generation_prompt
    return Rendering(
        add_generation_prompt=not asked.continue_final_message if add is None else add,
        continue_final_message=asked.continue_final_message,
        tools=tuple(tool.plain for tool in asked.tools),
        variables={
            name: value
            for name, value in asked.chat_template_kwargs.items()
            if value is not None and name in read
        },
    )


def _check_variable(name: str, read: frozenset[str]) -> None:
    if name in GIVEN:
        raise wrong("chat_template_kwargs", f"{shown(name)} is not for clients to set there")
    if name not in read | _SWITCHES:
        raise wrong("chat_template_kwargs", f"the model's template reads no variable {shown(name)}")
