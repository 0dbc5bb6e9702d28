"""The output items of one response: they grow with the answer's parts, and tell so in events."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta
from sagellm.gateway.answers.logprobs import Texts, chat_logprobs
from sagellm.gateway.answers.objects import ChatLogprob
from sagellm.gateway.answers.parts import is_json_object
from sagellm.gateway.answers.responses_objects import (
    ItemStatus,
    MessageText,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    ReasoningText,
)
from sagellm.gateway.answers.writer import AnswerSpec
from sagellm.runtime.messages import TokenEvent

# The type of an event without its "response.", and its fields besides the item's place.
ItemEvent: TypeAlias = tuple[str, dict[str, Any]]


class GrowingItem(Protocol):
    """An item that is being written."""

    @property
    def id(self) -> str: ...

    def item(self, status: ItemStatus) -> OutputItem:
        """Return the item as it is now."""

    def takes(self, part: AnswerPart) -> bool:
        """Whether a part of the answer belongs to this item."""

    def opened(self) -> Iterator[ItemEvent]:
        """Yield the events of the begin, after that of the item."""

    def grown(self, part: AnswerPart, logprobs: list[ChatLogprob]) -> Iterator[ItemEvent]:
        """Add a part that the item takes. Yield the events of it."""

    def closed(self) -> Iterator[ItemEvent]:
        """Yield the events of the end, before that of the item."""


class GrowingMessage:
    """The text for the user."""

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self._texts: list[str] = []
        self._logprobs: list[ChatLogprob] = []

    @property
    def _part(self) -> MessageText:
        return MessageText(text="".join(self._texts), logprobs=self._logprobs)

    def item(self, status: ItemStatus) -> OutputItem:
        content = [] if status == "in_progress" else [self._part]
        return OutputMessage(id=self.id, status=status, content=content)

    def takes(self, part: AnswerPart) -> bool:
        return isinstance(part, Content)

    def opened(self) -> Iterator[ItemEvent]:
        yield "content_part.added", {"content_index": 0, "part": MessageText(text="")}

    def grown(self, part: AnswerPart, logprobs: list[ChatLogprob]) -> Iterator[ItemEvent]:
        text = _text_of(part)
        self._texts.append(text)
        self._logprobs += logprobs
        yield "output_text.delta", {"content_index": 0, "delta": text, "logprobs": logprobs}

    def closed(self) -> Iterator[ItemEvent]:
        part = self._part
        told = {"content_index": 0, "text": part.text, "logprobs": part.logprobs}
        yield "output_text.done", told
        yield "content_part.done", {"content_index": 0, "part": part}


class GrowingReasoning:
    """The model's reasoning."""

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self._texts: list[str] = []

    @property
    def _part(self) -> ReasoningText:
        return ReasoningText(text="".join(self._texts))

    def item(self, status: ItemStatus) -> OutputItem:
        content = [] if status == "in_progress" else [self._part]
        return OutputReasoning(id=self.id, status=status, content=content)

    def takes(self, part: AnswerPart) -> bool:
        return isinstance(part, Reasoning)

    def opened(self) -> Iterator[ItemEvent]:
        yield "content_part.added", {"content_index": 0, "part": ReasoningText(text="")}

    def grown(self, part: AnswerPart, logprobs: list[ChatLogprob]) -> Iterator[ItemEvent]:
        text = _text_of(part)
        self._texts.append(text)
        yield "reasoning_text.delta", {"content_index": 0, "delta": text}

    def closed(self) -> Iterator[ItemEvent]:
        part = self._part
        yield "reasoning_text.done", {"content_index": 0, "text": part.text}
        yield "content_part.done", {"content_index": 0, "part": part}


class GrowingCall:
    """A tool call. `begin`: its first piece, which has the id and the name."""

    def __init__(self, item_id: str, begin: ToolCallDelta) -> None:
        self.id = item_id
        self._begin = begin
        self._arguments: list[str] = []

    def item(self, status: ItemStatus) -> OutputItem:
        return OutputCall(
            id=self.id,
            status=status,
            call_id=self._begin.id,
            name=self._begin.name,
            arguments="".join(self._arguments),
        )

    @property
    def is_whole(self) -> bool:
        return is_json_object("".join(self._arguments))

    def takes(self, part: AnswerPart) -> bool:
        return isinstance(part, ToolCallDelta) and part.index == self._begin.index

    def opened(self) -> Iterator[ItemEvent]:
        return iter(())

    def grown(self, part: AnswerPart, logprobs: list[ChatLogprob]) -> Iterator[ItemEvent]:
        if isinstance(part, ToolCallDelta) and part.arguments:
            self._arguments.append(part.arguments)
            yield "function_call_arguments.delta", {"delta": part.arguments}

    def closed(self) -> Iterator[ItemEvent]:
        arguments = "".join(self._arguments)
        told = {"arguments": arguments, "name": self._begin.name}
        yield "function_call_arguments.done", told


def _text_of(part: AnswerPart) -> str:
    return "" if isinstance(part, ToolCallDelta) else part.text


class OutputItems:
    """Makes items of the events of one choice: reasoning, messages and calls, one after another.

    `items`: those that have ended.
    """

    def __init__(self, asked: AnswerSpec, texts: Texts, ids: str) -> None:
        """`ids`: the end of the items' ids, which their number follows."""
        self.items: list[OutputItem] = []
        self._asked = asked
        self._texts = texts
        self._ids = ids
        self._parser = asked.open_parser()
        self._growing: GrowingItem | None = None
        self._logprobs: list[ChatLogprob] = []  # of tokens whose text the parser holds back

    def add(self, event: TokenEvent) -> Iterator[ItemEvent]:
        """Add an event of the choice. Yield the events that tell of it; the last ends all items."""
        if self._asked.has_logprobs:
            self._logprobs += chat_logprobs(self._texts, event.logprobs).content
        parts = self._parser.push(event.text)
        if event.finish_reason is not None:
            parts = [*parts, *self._parser.finish()]
        for part in parts:
            if self._asked.shows_reasoning or not isinstance(part, Reasoning):
                yield from self._add(part)
        if event.finish_reason is not None:
            yield from self._end(is_whole=event.finish_reason == "stop" and not self._is_cut(event))

    def _add(self, part: AnswerPart) -> Iterator[ItemEvent]:
        growing = self._growing
        if growing is None or not growing.takes(part):
            yield from self._close("completed")
            growing = self._growing = self._opened(part)
            yield "output_item.added", {**self._place, "item": growing.item("in_progress")}
            yield from self._placed(growing, growing.opened())
        logprobs, self._logprobs = self._logprobs, []
        yield from self._placed(growing, growing.grown(part, logprobs))

    def _is_cut(self, event: TokenEvent) -> bool:
        """Whether a stop string or token of the client has cut a call."""
        growing = self._growing
        return (
            event.stop_reason is not None
            and isinstance(growing, GrowingCall)
            and not growing.is_whole
        )

    def _end(self, *, is_whole: bool) -> Iterator[ItemEvent]:
        """End the last item. An answer without any item gets an empty message."""
        is_message = isinstance(self._growing, GrowingMessage)
        if (self._growing is None and not self.items) or (is_message and self._logprobs):
            yield from self._add(Content(""))
        yield from self._close("completed" if is_whole else "incomplete")

    def _close(self, status: ItemStatus) -> Iterator[ItemEvent]:
        growing = self._growing
        if growing is None:
            return
        yield from self._placed(growing, growing.closed())
        item = growing.item(status)
        yield "output_item.done", {**self._place, "item": item}
        self.items.append(item)
        self._growing = None

    def _opened(self, part: AnswerPart) -> GrowingItem:
        number = f"{self._ids}_{len(self.items)}"
        if isinstance(part, Content):
            return GrowingMessage(f"msg_{number}")
        if isinstance(part, Reasoning):
            return GrowingReasoning(f"rs_{number}")
        return GrowingCall(f"fc_{number}", part)

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.items)}

    def _placed(self, growing: GrowingItem, events: Iterator[ItemEvent]) -> Iterator[ItemEvent]:
        for kind, fields in events:
            yield kind, {"item_id": growing.id, **self._place, **fields}
