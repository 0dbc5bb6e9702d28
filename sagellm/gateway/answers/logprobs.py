"""Log probabilities of tokens, in the forms of completions, of chats and of vLLM."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from sagellm.gateway.answers.objects import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from sagellm.runtime.messages import TokenLogprob
from sagellm.runtime.models.tokenizer import Tokenizer

_LEAST = -9999.0  # shown instead of minus infinity, as by vLLM and OpenAI: JSON has no infinity


class Texts(Protocol):
    """The spelling of tokens in an answer, as bytes and as text."""

    def bytes(self, token_id: int) -> bytes: ...

    def text(self, token_id: int) -> str: ...


class TokenTexts:
    """Spells tokens as their text. Each token is looked up in the tokenizer once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._tokenizer.token_bytes(token_id)
        return found

    def text(self, token_id: int) -> str:
        """Return the token's text; `bytes:\\xf0\\x9f` for a part of a character, as in the API."""
        found = self._texts.get(token_id)
        if found is None:
            found = self._texts[token_id] = _spelt(self.bytes(token_id))
        return found


class TokenNames:
    """Spells tokens by their ids, as `token_id:17`: two tokens may have the same text."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def bytes(self, token_id: int) -> bytes:
        return self._texts.bytes(token_id)

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}"


def _spelt(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionLogprobsWriter:
    """Writes the logprobs of one choice, piece by piece. Text offsets continue over the pieces."""

    def __init__(self, texts: Texts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> CompletionLogprobs:
        """Return the logprobs of an echoed prompt. The prompt's first token has no logprob."""
        return self._write(token_ids, _padded(token_ids, logprobs))

    def tokens(self, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs:
        return self._write([entry.token_id for entry in logprobs], logprobs)

    def _write(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._texts.text(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else _shown(entry.logprob) for entry in logprobs],
            top_logprobs=[None if entry is None else self._top(entry) for entry in logprobs],
            text_offset=[self._next_offset(token_id) for token_id in token_ids],
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Return the logprobs of the most likely tokens and of the sampled token."""
        text = self._texts.text
        top: dict[str, float] = {}
        best = entry.top[: self._num_top]
        for token_id, logprob in (*best, (entry.token_id, entry.logprob)):
            top.setdefault(text(token_id), _shown(logprob))
        return top

    def _next_offset(self, token_id: int) -> int:
        """Return the offset of the next token, in characters, and advance past it."""
        offset = self._offset
        self._offset += len(self._characters.decode(self._texts.bytes(token_id)))
        return offset


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def prompt_logprobs(
    texts: Texts, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], num_top: int
) -> PromptLogprobs:
    """Return a prompt's logprobs in vLLM's form, with the `num_top` likeliest at each place."""
    return [
        None if entry is None else _prompt_logprob(texts, entry, num_top)
        for entry in _padded(token_ids, logprobs)
    ]


def _prompt_logprob(texts: Texts, entry: TokenLogprob, num_top: int) -> dict[int, PromptLogprob]:
    found = {entry.token_id: _ranked(texts, entry.token_id, entry.logprob, entry.rank)}
    for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1):
        found.setdefault(token_id, _ranked(texts, token_id, logprob, rank))
    return found


def _ranked(texts: Texts, token_id: int, logprob: float, rank: int | None) -> PromptLogprob:
    text = texts.bytes(token_id).decode(errors="replace")
    return PromptLogprob(_shown(logprob), rank, text)


def _padded(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> list[TokenLogprob | None]:
    """Return one entry for each token of a prompt. Leading tokens without a logprob get None."""
    return [*[None] * (len(token_ids) - len(logprobs)), *logprobs]


def chat_logprobs(texts: Texts, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Return the logprobs of one piece of a choice, in the form of chats."""
    return ChatLogprobs([_chat_logprob(texts, entry) for entry in logprobs])


def _chat_logprob(texts: Texts, entry: TokenLogprob) -> ChatLogprob:
    token_id = entry.token_id
    return ChatLogprob(
        token=texts.text(token_id),
        logprob=_shown(entry.logprob),
        bytes=list(texts.bytes(token_id)),
        top_logprobs=[
            TopLogprob(texts.text(top_id), _shown(logprob), list(texts.bytes(top_id)))
            for top_id, logprob in entry.top
        ],
    )


def _shown(logprob: float) -> float:
    """Return a logprob that JSON can represent."""
    return logprob if logprob > _LEAST else _LEAST
