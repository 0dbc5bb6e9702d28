"""/v1/chat/completions: what is sent back."""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from sagellm.gateway.answers.frame import Frame
from sagellm.gateway.answers.logprobs import Texts, chat_logprobs, prompt_logprobs
from sagellm.gateway.answers.reply import FINISH, Asked, Indexed
from sagellm.gateway.answers.sse import event as sse_event
from sagellm.gateway.answers.structs import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Ids,
    PromptLogprobs,
    Usage,
)
from sagellm.runtime.messages import TokenEvent

_ROLE = ChatDelta(role="assistant", content="")


class ChatForm:
    """Writes the choices of one call; a stream begins with the role of each."""

    def __init__(self, asked: Asked, texts: Texts) -> None:
        self._asked = asked
        self._texts = texts
        self._frames: dict[int, Frame] = {}
        self._usage: UnsetType | None = None if asked.has_usage else UNSET
        self._shows_prompt = asked.num_prompt_logprobs is not None  # still to be shown
        self._is_plain = not (asked.has_logprobs or asked.has_token_ids or self._shows_prompt)

    def opening(self, usage: Usage | None) -> bytes:
        roles = [
            self._chunk([ChatChunkChoice(index, _ROLE)], usage, self._prompt_ids)
            for index in range(self._asked.num_indices)
        ]
        return b"".join(sse_event(msgspec.json.encode(role)) for role in roles)

    def chunk(self, index: int, event: TokenEvent, usage: Usage | None) -> bytes:
        if self._is_plain and event.finish_reason is None and usage is None:
            return self._frame(index).with_text(event.text)
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=event.text),
            logprobs=self._logprobs(event),
            finish_reason=FINISH[event.finish_reason],
            stop_reason=event.stop_reason,
            token_ids=self._token_ids(event),
        )
        chunk = self._chunk([choice], usage, prompt_logprobs=self._prompt_logprobs(event))
        return sse_event(msgspec.json.encode(chunk))

    def usage(self, usage: Usage) -> bytes:
        return sse_event(msgspec.json.encode(self._chunk([], usage)))

    def whole(self, choices: Iterable[Indexed], usage: Usage) -> bytes:
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
        return ChatChoice(
            index=index,
            message=ChatMessage(content=event.text),
            logprobs=self._logprobs(event),
            finish_reason=FINISH[event.finish_reason],
            stop_reason=event.stop_reason,
            token_ids=self._token_ids(event),
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | None,
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

    def _frame(self, index: int) -> Frame:
        frame = self._frames.get(index)
        if frame is None:
            chunk = self._chunk([ChatChunkChoice(index, ChatDelta(content=Frame.MARK))], None)
            frame = self._frames[index] = Frame(chunk)
        return frame

    def _logprobs(self, event: TokenEvent) -> ChatLogprobs | None:
        return chat_logprobs(self._texts, event.logprobs) if self._asked.has_logprobs else None

    def _prompt_logprobs(self, event: TokenEvent) -> PromptLogprobs | UnsetType:
        """Once: every choice's first event has the same."""
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
