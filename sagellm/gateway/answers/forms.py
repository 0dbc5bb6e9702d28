"""The JSON of answers to /v1/completions and /v1/chat/completions, in chunks or whole."""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from sagellm.chat_formats import open_plain_parser
from sagellm.gateway.answers.event_stream import DONE, escaped, failure
from sagellm.gateway.answers.event_stream import event as sse_event
from sagellm.gateway.answers.logprobs import (
    CompletionLogprobsWriter,
    Texts,
    chat_logprobs,
    joined,
    prompt_logprobs,
)
from sagellm.gateway.answers.objects import (
    ApiFinishReason,
    ApiUsage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    Ids,
    PromptLogprobs,
)
from sagellm.gateway.answers.parts import ChoiceParts, delta_of, message_of
from sagellm.gateway.answers.writer import FINISH, AnswerSpec, Indexed
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.messages import TokenEvent
from sagellm.session.requests import Encoded

_MARK = "\0"  # the placeholder of the text; no other field of a chunk contains it
_ENCODED_MARK = msgspec.json.encode(_MARK)
_encode = msgspec.json.Encoder().encode


class ChunkTemplate:
    """An encoded chunk with a gap for its text: cheaper to fill than to encode a chunk."""

    MARK = _MARK

    def __init__(self, chunk: msgspec.Struct) -> None:
        """`chunk` must have MARK as its text."""
        self._head, _, self._tail = sse_event(_encode(chunk)).partition(_ENCODED_MARK)

    def with_text(self, text: str) -> bytes:
        return self._head + escaped(_encode(text)) + self._tail


class CompletionForm:
    """Writes the answer to one completion. With `echo`, each choice begins with its prompt."""

    def __init__(self, asked: AnswerSpec, texts: Texts) -> None:
        self._asked = asked
        self._texts = texts
        self._choices: dict[int, CompletionLogprobsWriter] = {}  # choices with a first event
        self._frames: dict[int, ChunkTemplate] = {}
        # As in the OpenAI API: with `include_usage`, all chunks but the last have a null usage.
        self._usage: UnsetType | None = None if asked.has_usage else UNSET
        self._is_plain = not (  # chunks differ only in their text, so templates can write them
            asked.has_logprobs
            or asked.has_token_ids
            or asked.is_echo
            or asked.num_prompt_logprobs is not None
        )

    def opening(self, usage: ApiUsage | None) -> bytes:
        return b""

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        if self._is_plain and event.finish_reason is None and usage is None:
            return self._frame(index).with_text(event.text)
        chunk = self._chunk([self._choice(index, event)], usage)
        return sse_event(msgspec.json.encode(chunk))

    def ending(self, usage: ApiUsage) -> bytes:
        if not self._asked.has_usage:
            return DONE
        return sse_event(msgspec.json.encode(self._chunk([], usage))) + DONE

    def failure(self, error: ApiError) -> bytes:
        return failure(error)

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        asked = self._asked
        completion = Completion(
            id=asked.id,
            created=asked.created,
            model=asked.model,
            choices=[self._choice(index, event) for index, event in choices],
            usage=usage,
        )
        return msgspec.json.encode(completion)

    def _chunk(self, choices: list[CompletionChoice], usage: ApiUsage | None) -> CompletionChunk:
        asked = self._asked
        return CompletionChunk(
            id=asked.id,
            created=asked.created,
            model=asked.model,
            choices=choices,
            usage=self._usage if usage is None else usage,
        )

    def _frame(self, index: int) -> ChunkTemplate:
        frame = self._frames.get(index)
        if frame is None:
            chunk = self._chunk([CompletionChoice(index, ChunkTemplate.MARK)], None)
            frame = self._frames[index] = ChunkTemplate(chunk)
        return frame

    def _choice(self, index: int, event: TokenEvent) -> CompletionChoice:
        asked, is_first = self._asked, index not in self._choices
        writer = self._choices.setdefault(
            index, CompletionLogprobsWriter(self._texts, asked.num_logprobs or 0)
        )
        prompt = asked.prompts[min(index // asked.num_choices, len(asked.prompts) - 1)]
        is_echoed = is_first and asked.is_echo
        return CompletionChoice(
            index=index,
            text=prompt.text + event.text if is_echoed else event.text,
            logprobs=_logprobs(writer, event, prompt if is_echoed else None)
            if asked.has_logprobs
            else None,
            finish_reason=FINISH[event.finish_reason],
            stop_reason=event.stop_reason,
            prompt_token_ids=prompt.token_ids if asked.has_token_ids and is_first else UNSET,
            token_ids=event.token_ids if asked.has_token_ids else UNSET,
            prompt_logprobs=self._prompt_logprobs(prompt, event) if is_first else UNSET,
        )

    def _prompt_logprobs(self, prompt: Encoded, event: TokenEvent) -> PromptLogprobs | UnsetType:
        num_top = self._asked.num_prompt_logprobs
        if num_top is None:
            return UNSET
        return prompt_logprobs(self._texts, prompt.token_ids, event.prompt_logprobs, num_top)


def _logprobs(
    writer: CompletionLogprobsWriter, event: TokenEvent, prompt: Encoded | None
) -> CompletionLogprobs:
    """Return the logprobs of an event's tokens, after those of its prompt if `prompt` is given."""
    if prompt is None:
        return writer.tokens(event.logprobs)
    echoed = writer.prompt(prompt.token_ids, event.prompt_logprobs)
    return joined(echoed, writer.tokens(event.logprobs))


_ROLE = ChatDelta(role="assistant", content="")


class ChatForm:
    """Writes the answer to one chat. A stream begins with one role chunk for each choice."""

    def __init__(self, asked: AnswerSpec, texts: Texts) -> None:
        self._asked = asked
        self._texts = texts
        self._frames: dict[int, ChunkTemplate] = {}
        self._usage: UnsetType | None = None if asked.has_usage else UNSET
        # Whether the prompt's logprobs were requested and not yet written.
        self._shows_prompt = asked.num_prompt_logprobs is not None
        self._is_plain = not (asked.has_logprobs or asked.has_token_ids or self._shows_prompt)
        self._is_parsed = asked.open_parser is not open_plain_parser
        self._parts: dict[int, ChoiceParts] = {}

    def opening(self, usage: ApiUsage | None) -> bytes:
        # Clients learn the role of each choice before its text, as in the OpenAI API.
        roles = [
            self._chunk([ChatChunkChoice(index, _ROLE)], usage, self._prompt_ids)
            for index in range(self._asked.num_indices)
        ]
        return b"".join(sse_event(msgspec.json.encode(role)) for role in roles)

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        if self._is_parsed:
            return self._parsed_chunk(index, event, usage)
        if self._is_plain and event.finish_reason is None and usage is None:
            return self._frame(index).with_text(event.text)
        finish = FINISH[event.finish_reason]
        return self._encoded_chunk(index, event, usage, ChatDelta(content=event.text), finish)

    def _parsed_chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        parts = self._parts_of(index)
        piece = parts.push(event)
        is_usual = self._is_plain and event.finish_reason is None and usage is None
        if is_usual and piece.has_only_content:
            return self._frame(index).with_text(piece.content)
        finish = parts.finish_reason(event)
        return self._encoded_chunk(index, event, usage, delta_of(piece), finish)

    def _encoded_chunk(
        self,
        index: int,
        event: TokenEvent,
        usage: ApiUsage | None,
        delta: ChatDelta,
        finish: ApiFinishReason | None,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(event),
            finish_reason=finish,
            stop_reason=event.stop_reason,
            token_ids=self._token_ids(event),
        )
        chunk = self._chunk([choice], usage, prompt_logprobs=self._prompt_logprobs(event))
        return sse_event(msgspec.json.encode(chunk))

    def ending(self, usage: ApiUsage) -> bytes:
        if not self._asked.has_usage:
            return DONE
        return sse_event(msgspec.json.encode(self._chunk([], usage))) + DONE

    def failure(self, error: ApiError) -> bytes:
        return failure(error)

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        asked, told = self._asked, list(choices)
        completion = ChatCompletion(
            id=asked.id,
            created=asked.created,
            model=asked.model,
            choices=[self._choice(index, event) for index, event in told],
            usage=usage,
            prompt_token_ids=self._prompt_ids,
            prompt_logprobs=self._prompt_logprobs(told[0][1]),
        )
        return msgspec.json.encode(completion)

    def _choice(self, index: int, event: TokenEvent) -> ChatChoice:
        parts = self._parts_of(index)
        message = message_of(parts.push(event))
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(event),
            finish_reason=parts.finish_reason(event),
            stop_reason=event.stop_reason,
            token_ids=self._token_ids(event),
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: ApiUsage | None,
        prompt_token_ids: Ids | UnsetType = UNSET,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
    ) -> ChatChunk:
        asked = self._asked
        return ChatChunk(
            id=asked.id,
            created=asked.created,
            model=asked.model,
            choices=choices,
            usage=self._usage if usage is None else usage,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
        )

    def _parts_of(self, index: int) -> ChoiceParts:
        parts = self._parts.get(index)
        if parts is None:
            shown = self._asked.shows_reasoning
            parts = ChoiceParts(self._asked.open_parser, shows_reasoning=shown)
            self._parts[index] = parts
        return parts

    def _frame(self, index: int) -> ChunkTemplate:
        frame = self._frames.get(index)
        if frame is None:
            chunk = self._chunk(
                [ChatChunkChoice(index, ChatDelta(content=ChunkTemplate.MARK))], None
            )
            frame = self._frames[index] = ChunkTemplate(chunk)
        return frame

    def _logprobs(self, event: TokenEvent) -> ChatLogprobs | None:
        return chat_logprobs(self._texts, event.logprobs) if self._asked.has_logprobs else None

    def _prompt_logprobs(self, event: TokenEvent) -> PromptLogprobs | UnsetType:
        """Return the prompt's logprobs at the first call, and UNSET at later calls."""
        # The first event of every choice has the same prompt logprobs.
        if not self._shows_prompt:
            return UNSET
        self._shows_prompt = False
        token_ids, num_top = self._asked.prompts[0].token_ids, self._asked.num_prompt_logprobs or 0
        return prompt_logprobs(self._texts, token_ids, event.prompt_logprobs, num_top)

    def _token_ids(self, event: TokenEvent) -> Ids | UnsetType:
        return event.token_ids if self._asked.has_token_ids else UNSET

    @property
    def _prompt_ids(self) -> Ids | UnsetType:
        return self._asked.prompts[0].token_ids if self._asked.has_token_ids else UNSET
