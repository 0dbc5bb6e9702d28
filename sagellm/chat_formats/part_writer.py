"""The writer of an answer's parts, which the readers of all formats use."""

from collections.abc import Callable

from sagellm.chat_formats.chat_format import (
    AnswerPart,
    Content,
    Reasoning,
    ToolCallDelta,
    ToolSpec,
    ToolUse,
)


class PartWriter:
    """Collects the parts of one answer. Adjacent pieces of one part are joined."""

    def __init__(self, use: ToolUse, new_id: Callable[[], str]) -> None:
        self._tools = {tool.name: tool for tool in use.allowed}
        self._is_parallel = use.parallel
        self._new_id = new_id
        self._parts: list[AnswerPart] = []
        self._pieces: list[str] = []  # of the part at the end, which may go on
        self._kind: type[AnswerPart] | None = None  # of that part
        self._num_calls = 0
        self._ids: set[str] = set()  # of the calls so far

    def content(self, text: str) -> None:
        self._add(Content, text)

    def reasoning(self, text: str) -> None:
        self._add(Reasoning, text)

    def begin_call(self, name: str, call_id: str = "") -> ToolSpec | None:
        """Begin a call, and return its tool. Return None, and do nothing, if no allowed tool has
        the name.

        `call_id`: the id that the model wrote; "" or one that the answer has already gets a new id.
        Without parallel calls, all calls after the first are dropped, as in vLLM.
        """
        tool = self._tools.get(name)
        if tool is not None:
            self._close()
            self._num_calls += 1
            if not self._is_dropped:
                new_id = call_id if call_id and call_id not in self._ids else self._new_id()
                self._ids.add(new_id)
                self._parts.append(ToolCallDelta(self._num_calls - 1, new_id, name))
        return tool

    def arguments(self, text: str) -> None:
        """Add to the arguments of the call that began last."""
        if not self._is_dropped:
            self._add(ToolCallDelta, text)

    def take(self) -> list[AnswerPart]:
        """Return the collected parts, and forget them."""
        self._close()
        parts, self._parts = self._parts, []
        return parts

    @property
    def _is_dropped(self) -> bool:
        return self._num_calls > 1 and not self._is_parallel

    def _add(self, kind: type[AnswerPart], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._pieces.append(text)

    def _close(self) -> None:
        text = "".join(self._pieces)
        if self._kind is ToolCallDelta:
            self._parts.append(ToolCallDelta(self._num_calls - 1, arguments=text))
        elif self._kind is not None:
            self._parts.append(Content(text) if self._kind is Content else Reasoning(text))
        self._pieces.clear()
        self._kind = None
