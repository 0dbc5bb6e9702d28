"""Writes answers to /v1/messages: a stream of events that fill blocks, or a whole message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from sagellm.chat_formats import AnswerPart, Content, Reasoning, ToolCallDelta
from sagellm.gateway.answers.anthropic_objects import (
    AnswerContent,
    AnsweredMessage,
    AnthropicFailure,
    BlockDelta,
    BlockStart,
    BlockStop,
    InputDelta,
    MessageDelta,
    MessageEvent,
    MessageStart,
    MessageStop,
    PingEvent,
    SignatureDelta,
    StopDelta,
    StopReason,
    TextContent,
    TextDelta,
    ThinkingContent,
    ThinkingDelta,
    ToolUseContent,
    anthropic_error,
    message_usage,
)
from sagellm.gateway.answers.event_stream import named_event
from sagellm.gateway.answers.logprobs import Texts
from sagellm.gateway.answers.objects import ApiUsage
from sagellm.gateway.answers.parts import is_json_object
from sagellm.gateway.answers.writer import AnswerSpec, Indexed
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.messages import TokenEvent

# Reasoning is shown; or its blocks are empty; or there are none.
ShownThinking: TypeAlias = Literal["shown", "empty", "none"]
_EMPTY = msgspec.Raw(b"{}")
_OWN_IDS, _API_IDS = "call_", "toolu_"  # how ids of tool calls begin, here and in this API


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageOptions:
    """The facts that the answer to /v1/messages depends on, besides its text.

    `is_clipped`: the context ends before the answer has as many tokens as the client allows.
    """

    stop_sequences: tuple[str, ...] = ()
    thinking: ShownThinking = "shown"
    is_clipped: bool = False


class BlockWriter:
    """Turns the parts of an answer into the events of its blocks, one block after the other."""

    def __init__(self, thinking: ShownThinking) -> None:
        self._thinking = thinking
        self._num_closed = 0
        self._open: AnswerContent | None = None
        self._call = -1  # index of the last tool call
        self._space = ""  # held back: a text block is not made of white space alone

    @property
    def has_calls(self) -> bool:
        return self._call >= 0

    def add(self, part: AnswerPart) -> list[MessageEvent]:
        """Return the events of the next part."""
        match part:
            case Content():
                return self._add_text(part.text)
            case Reasoning():
                return self._add_thinking(part.text)
            case ToolCallDelta():
                return self._add_call(part)

    def close(self) -> list[MessageEvent]:
        """Return the events that end the open block; none if no block is open."""
        self._space = ""
        if self._open is None:
            return []
        index, self._num_closed = self._num_closed, self._num_closed + 1
        is_thinking, self._open = isinstance(self._open, ThinkingContent), None
        signed = [BlockDelta(index, SignatureDelta())] if is_thinking else []
        return [*signed, BlockStop(index)]

    def _begin(self, block: AnswerContent) -> list[MessageEvent]:
        events = self.close()
        self._open = block
        return [*events, BlockStart(self._num_closed, block)]

    def _add_text(self, text: str) -> list[MessageEvent]:
        if isinstance(self._open, TextContent):
            return [BlockDelta(self._num_closed, TextDelta(text))]
        if not text or text.isspace():
            self._space += text
            return []
        text = self._space + text
        begun = self._begin(TextContent(""))
        return [*begun, BlockDelta(self._num_closed, TextDelta(text))]

    def _add_thinking(self, text: str) -> list[MessageEvent]:
        if self._thinking == "none":
            return []
        is_open = isinstance(self._open, ThinkingContent)
        events = [] if is_open else self._begin(ThinkingContent(""))
        if self._thinking == "shown":
            events.append(BlockDelta(self._num_closed, ThinkingDelta(text)))
        return events

    def _add_call(self, piece: ToolCallDelta) -> list[MessageEvent]:
        events: list[MessageEvent] = []
        if piece.index != self._call:
            self._call = piece.index
            events += self._begin(ToolUseContent(_tool_id(piece.id), piece.name, _EMPTY))
        if piece.arguments:
            events.append(BlockDelta(self._num_closed, InputDelta(piece.arguments)))
        return events


def _tool_id(call_id: str) -> str:
    """Return the id of a tool call as this API writes it. Ids that a format prescribes stay."""
    own = call_id.startswith(_OWN_IDS)
    return _API_IDS + call_id.removeprefix(_OWN_IDS) if own else call_id


class MessagesForm:
    """Writes the answer to /v1/messages, which has one choice.

    The request must ask for continuous usage: the first and the last event have it.
    """

    def __init__(self, asked: AnswerSpec, texts: Texts, options: MessageOptions) -> None:
        self._asked = asked
        self._options = options
        self._parser = asked.open_parser()
        self._blocks = BlockWriter(options.thinking)

    def opening(self, usage: ApiUsage | None) -> bytes:
        return _encoded([MessageStart(self._message([], usage)), PingEvent()])

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        if index:  # an operator has made more choices than the one that was asked for
            return b""
        events = self._content_events(event)
        if event.is_last:
            assert usage is not None
            events.append(MessageDelta(self._stop(event), message_usage(usage)))
        return _encoded(events)

    def ending(self, usage: ApiUsage) -> bytes:
        return _encoded([MessageStop()])

    def failure(self, error: ApiError) -> bytes:
        return _encoded([AnthropicFailure(anthropic_error(error))])

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        _, event = next(iter(choices))
        content = _content(self._content_events(event))
        return msgspec.json.encode(self._message(content, usage, self._stop(event)))

    def _content_events(self, event: TokenEvent) -> list[MessageEvent]:
        parts = self._parser.push(event.text)
        if event.is_last:
            parts = [*parts, *self._parser.finish()]
        events = [made for part in parts for made in self._blocks.add(part)]
        return events + self._blocks.close() if event.is_last else events

    def _message(
        self, content: list[AnswerContent], usage: ApiUsage | None, stop: StopDelta | None = None
    ) -> AnsweredMessage:
        assert usage is not None
        return AnsweredMessage(
            id=self._asked.id,
            model=self._asked.model,
            content=content,
            stop_reason=None if stop is None else stop.stop_reason,
            stop_sequence=None if stop is None else stop.stop_sequence,
            usage=message_usage(usage),
        )

    def _stop(self, event: TokenEvent) -> StopDelta:
        """Return why the answer ended."""
        if event.finish_reason == "filtered":
            return StopDelta("refusal", None)
        if event.finish_reason == "length":
            full: StopReason = "model_context_window_exceeded"
            return StopDelta(full if self._options.is_clipped else "max_tokens", None)
        if event.stop_reason in self._options.stop_sequences:
            return StopDelta("stop_sequence", str(event.stop_reason))
        return StopDelta("tool_use" if self._blocks.has_calls else "end_turn", None)


def _encoded(events: Iterable[MessageEvent]) -> bytes:
    return b"".join(
        named_event(str(event.__struct_config__.tag), msgspec.json.encode(event))
        for event in events
    )


def _content(events: Sequence[MessageEvent]) -> list[AnswerContent]:
    """Return the blocks that the events of a whole stream fill."""
    filled: list[AnswerContent] = []
    block: AnswerContent | None = None
    pieces: list[str] = []
    for event in events:
        match event:
            case BlockStart():
                block, pieces = event.content_block, []
            case BlockDelta():
                pieces.append(_piece(event))
            case BlockStop():
                assert block is not None
                filled.append(_filled(block, "".join(pieces)))
    return filled


def _piece(event: BlockDelta) -> str:
    match event.delta:
        case TextDelta(text):
            return text
        case ThinkingDelta(thinking):
            return thinking
        case InputDelta(partial_json):
            return partial_json
    return ""


def _filled(block: AnswerContent, text: str) -> AnswerContent:
    match block:
        case TextContent():
            return TextContent(text)
        case ThinkingContent():
            return ThinkingContent(text)
        case ToolUseContent():
            return msgspec.structs.replace(block, input=_input(text))


def _input(text: str) -> msgspec.Raw:
    """Return the JSON text of a tool call's input: {} if the model did not write a whole one."""
    return msgspec.Raw(text.encode()) if is_json_object(text) else _EMPTY
