"""Prompts to text and token ids; what may take long is done in a worker thread, within bounds."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio
import msgspec

from sagellm.gateway.failure import ApiError, wrong
from sagellm.gateway.threads import NoThread, Overrun, Threads
from sagellm.runtime.models.bad_words import bad_words_token_ids
from sagellm.runtime.models.chat import ANSWERED, ChatTemplateError, Rendering
from sagellm.runtime.models.tokenizer import Messages, Tokenizer

TEMPLATE_S = 0.25  # of CPU, to render one conversation: beyond, its messages are at fault
TOKENIZE_S = 60.0  # of the clock, waiting for a thread included: beyond, the server is overloaded
RETRY_S = 1.0
_SHORT_LEN = 2048  # characters, or tokens, that are worked faster than a thread is woken for
_CHARS_A_TOKEN = 16  # more than most texts have: a beginning so long shows what does not fit
_NUM_THREADS = 4  # of each kind; one that outlives its deadline keeps its place until it ends
T = TypeVar("T")


class Prompt(msgspec.Struct, frozen=True):
    """A prompt ready for the graph."""

    text: str
    token_ids: tuple[int, ...]


class Encoder:
    """Encodes prompts on any event loop without stalling it. Never empty: that is a 400."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rendering = Threads(_NUM_THREADS)
        self._tokenizing = Threads(_NUM_THREADS)

    async def text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokens of a text. Raises ApiError where that takes too long."""

        def encode() -> tuple[int, ...]:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return await self._tokenize(encode, len(text))

    async def exceeds(self, text: str, max_len: int) -> bool:
        """Whether the beginning of a long text alone has far more tokens than `max_len`; False also
        where only the whole text would show it. Raises ApiError where that takes too long.

        What follows merges with no more than the end of the beginning: twice `max_len` is enough.
        """
        beginning = text[: _CHARS_A_TOKEN * max_len]
        return len(beginning) < len(text) and len(await self.text(beginning)) > 2 * max_len

    async def ids(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens. Raises ApiError where that takes too long."""

        def decode() -> str:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await self._tokenize(decode, len(token_ids))

    async def spelt(self, token_ids: tuple[int, ...]) -> list[str]:
        """Each token as the vocabulary spells it. Raises ApiError where that takes too long."""

        def spell() -> list[str]:
            return [self._tokenizer.token(token_id) for token_id in token_ids]

        return await self._tokenize(spell, len(token_ids))

    async def banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Bad words as sequences of tokens. Raises ApiError where that takes too long."""

        def encode() -> tuple[tuple[int, ...], ...]:
            return bad_words_token_ids(self._tokenizer, words)

        return await self._tokenize(encode, sum(map(len, words)))

    async def chat(
        self, messages: Messages, how: Rendering = ANSWERED, *, add_special_tokens: bool = False
    ) -> Prompt:
        """The prompt of a conversation. Raises ApiError where its template does not admit it."""
        text = await self.render(messages, how)
        return Prompt(text, await self.text(text, add_special_tokens=add_special_tokens))

    async def render(self, messages: Messages, how: Rendering = ANSWERED) -> str:
        """The text of a conversation. Raises ApiError where its template does not admit it.

        In a thread always: how long a template loops is no matter of how long a message is.
        """

        def render() -> str:
            return self._tokenizer.apply_chat_template(messages, how)

        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._rendering.run_within(TEMPLATE_S, render)
        except Overrun:
            late = f"the chat template took longer than {TEMPLATE_S:g} s of CPU time"
            raise wrong("messages", late) from None
        except (NoThread, TimeoutError):  # others have all the threads: no fault of these messages
            raise _busy() from None
        except ChatTemplateError:
            refused = "the model's chat template does not admit them, or it has none"
            raise wrong("messages", refused) from None

    async def _tokenize(self, work: Callable[[], T], size: int) -> T:
        if size <= _SHORT_LEN:
            return work()
        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._tokenizing.run(work)
        except TimeoutError:
            raise _busy() from None


def _busy() -> ApiError:
    late = "the prompt could not be tokenised in time"
    return ApiError(503, late, code="tokenizer_busy", retry_after_s=RETRY_S)
