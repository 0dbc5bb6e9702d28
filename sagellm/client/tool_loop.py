"""A conversation in which a model calls tools until it answers: its state, and its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from sagellm.client.http_calls import Messages
from sagellm.client.python_tools import OnError, PythonTool, ToolBox, ToolCallable
from sagellm.client.replies import ResponseToolCall, T, TextReply
from sagellm.client.responses import CUT_OFF, MISUSED, ClientError

MAX_ROUNDS = 8
FORMS = ("response_format", "structured_outputs", "regex", "choices", "grammar")
TOO_MANY_ROUNDS = "too_many_rounds"  # the code of ToolsUnfinished


@dataclass(frozen=True, slots=True)
class ToolRun(Generic[T]):
    """The end of a conversation with tools. `reply`: the answer. `messages`: all messages, with
    tool calls, results and the answer.
    """

    reply: TextReply[T]
    messages: list[dict[str, Any]]

    @property
    def text(self) -> str:
        return self.reply.text

    @property
    def parsed(self) -> T:
        """The answer as a value, like `TextReply.parsed`. Raises ClientError."""
        return self.reply.parsed

    def __str__(self) -> str:
        return self.text


class ToolsUnfinished(ClientError):
    """The model still calls tools in the last round. `messages`: the conversation so far, without
    these calls.
    """

    def __init__(self, max_rounds: int, messages: list[dict[str, Any]]) -> None:
        cause = f"the model still calls tools in round {max_rounds}; raise max_rounds"
        super().__init__(cause, code=TOO_MANY_ROUNDS)
        self.messages = messages


class ToolLoop:
    """The state of a conversation with tools. Each round asks the model once.

    A round: ask the model with `messages` and `fields`, give the reply to `take`, run the calls
    that it returns, and give each result to `add_result`. The loop ends with a reply without calls.
    An answer that is bound to a form is asked for by one more call, without tool calls: a server
    can bind an answer to calls or to a form.
    """

    def __init__(
        self,
        messages: Messages,
        tools: Sequence[ToolCallable | PythonTool],
        options: Mapping[str, Any],
        *,
        max_rounds: int = MAX_ROUNDS,
        on_error: OnError | None = None,
    ) -> None:
        if options.get("stream"):
            cause = "run_tools takes no stream; stream a chat, and run the calls of its reply"
            raise ClientError(cause, code=MISUSED)
        if options.get("n") not in (None, 1):
            raise ClientError("run_tools takes no n; ask for one choice", code=MISUSED)
        if max_rounds < 1:
            raise ClientError(f"max_rounds is {max_rounds}; give 1 or more", code=MISUSED)
        self.box = ToolBox(tools, on_error)
        self.messages: list[dict[str, Any]] = [dict(message) for message in messages]
        self.is_over = False
        self._forms = {name: each for name, each in options.items() if name in FORMS}
        self._options = {name: each for name, each in options.items() if name not in FORMS}
        self._is_bound = not tools or all(form is None for form in self._forms.values())
        self._max_rounds = max_rounds
        self._num_rounds = 0
        self._is_last = False  # the call that binds the answer has no tool calls

    @property
    def fields(self) -> dict[str, Any]:
        """The options of the next call."""
        tools = self.box.plain
        fields = {**self._options, **({"tools": tools} if tools else {})}
        if self._is_bound:
            fields |= self._forms
        if self._num_rounds and "tool_choice" in fields:
            fields["tool_choice"] = _unforced(fields["tool_choice"])
        return fields | ({"tool_choice": "none"} if self._is_last and tools else {})

    @property
    def has_answer_next(self) -> bool:
        """Whether the next reply may be the answer, not a draft of a bound one."""
        return self._is_bound

    def take(self, reply: TextReply[Any]) -> tuple[ResponseToolCall, ...]:
        """Add a reply to the messages, and return its calls. A draft is not added.

        Raises ToolsUnfinished for calls of the last round, ClientError for calls that are cut off.
        """
        self._num_rounds += 1
        if reply.tool_calls and self._num_rounds >= self._max_rounds:
            raise ToolsUnfinished(self._max_rounds, self.messages)
        if reply.tool_calls and reply.finish_reason == "length":
            cause = "the answer was cut off inside a tool call; raise max_tokens"
            raise ClientError(cause, code=CUT_OFF)
        if reply.tool_calls or self._is_bound:
            self.messages.append(reply.message)
            self.is_over = not reply.tool_calls
        else:
            self._is_bound = self._is_last = True
        return reply.tool_calls

    def add_result(self, call: ResponseToolCall, text: str) -> None:
        """Add the result of a call to the messages."""
        result = {"role": "tool", "tool_call_id": call.id or "", "content": text}
        self.messages.append(result)


def _unforced(choice: Any) -> Any:
    """The tool choice of later rounds: a call that is forced in each could never be the last."""
    if choice in (None, "none"):
        return choice
    allowed = choice.get("allowed_tools") if isinstance(choice, Mapping) else None
    if not isinstance(allowed, Mapping):
        return "auto"
    return {**choice, "allowed_tools": {**allowed, "mode": "auto"}}
