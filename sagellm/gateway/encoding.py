"""Prompts to text and token ids; what may take long is done in a worker thread, within bounds.

What a model's own files may make endless is done in a helper process (`runtime/models/sandbox/`).
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import anyio
import msgspec

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.threads import NoThread, Overrun, WorkerThreads
from sagellm.runtime.models import HelperUnavailable, LimitExceeded, TextError
from sagellm.runtime.models.chat import DEFAULT_RENDERING, ChatTemplateError, Rendering
from sagellm.runtime.models.sandbox import MAX_IDLE
from sagellm.runtime.models.tokenizer import Messages, Tokenizer, bad_words_token_ids

TEMPLATE_S = 0.25  # of CPU, to render one conversation: beyond, its messages are at fault
TOKENIZE_S = 60.0  # of the clock, waiting for a thread included: beyond, the server is overloaded
RETRY_S = 1.0
_SHORT_LEN = 2048  # characters, or tokens, that are worked faster than a thread is woken for
_SHORT_CHARS = 16384  # that are sent to a helper process without holding the loop
_CHARS_A_TOKEN = 16  # more than most texts have: a beginning so long shows what does not fit
_NUM_THREADS = 4  # of each kind; one that outlives its deadline keeps its place until it ends
T = TypeVar("T")


class EncodedPrompt(msgspec.Struct, frozen=True):
    """A prompt ready for the graph. `messages`: of a chat whose engine takes text."""

    text: str
    token_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] = ()


class PromptEncoder:
    """Encodes prompts on any event loop without stalling it. Never empty: that is a 400."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rendering = WorkerThreads(_NUM_THREADS)
        self._tokenizing = WorkerThreads(_NUM_THREADS)

    @cached_property
    def _renderers(self) -> anyio.CapacityLimiter:
        """Places in helper processes; as those of Threads, made on the loop that uses them."""
        return anyio.CapacityLimiter(MAX_IDLE)

    @cached_property
    def _encoders(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(MAX_IDLE)

    async def variables(self) -> frozenset[str]:
        """The names that the chat template reads; none where it is broken."""
        isolated = self._tokenizer.isolated_template
        if isolated is None:
            return self._tokenizer.chat_variables
        with _admitted("messages"):
            return await isolated.variables_async()

    async def text(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[int, ...]:
        """Tokens of a text, which the field `param` gave. Raises ApiError where the tokenizer does
        not admit it, or takes too long.
        """

        def encode() -> tuple[int, ...]:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

        isolated = self._tokenizer.isolated_encoder
        if isolated is None:
            return await self._tokenize(encode, len(text))
        with _admitted(param):
            if len(text) > _SHORT_CHARS:
                return await self._within(self._encoders, lambda: self._tokenizing.run(encode))
            return await self._within(
                self._encoders,
                lambda: isolated.encode_async(text, add_special_tokens=add_special_tokens),
            )

    async def exceeds(self, text: str, max_len: int, *, param: str = "prompt") -> bool:
        """Whether the beginning of a long text alone has far more tokens than `max_len`; False also
        where only the whole text would show it. Raises ApiError as `text`.

        What follows merges with no more than the end of the beginning: twice `max_len` is enough.
        """
        beginning = text[: _CHARS_A_TOKEN * max_len]
        if len(beginning) == len(text):
            return False
        return len(await self.text(beginning, param=param)) > 2 * max_len

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

        if self._tokenizer.isolated_encoder is None:
            return await self._tokenize(encode, sum(map(len, words)))
        with _admitted("bad_words"):
            return await self._within(self._encoders, lambda: self._tokenizing.run(encode))

    async def chat(
        self,
        messages: Messages,
        how: Rendering = DEFAULT_RENDERING,
        *,
        add_special_tokens: bool = False,
    ) -> EncodedPrompt:
        """The prompt of a conversation. Raises ApiError where its template does not admit it."""
        text = await self.render(messages, how)
        token_ids = await self.text(text, add_special_tokens=add_special_tokens, param="messages")
        return EncodedPrompt(text, token_ids)

    async def render(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        """The text of a conversation. Raises ApiError where its template does not admit it."""

        def render() -> str:
            return self._tokenizer.apply_chat_template(messages, how)

        isolated = self._tokenizer.isolated_template
        with _admitted("messages"):
            if isolated is None:
                return await self._render_here(render)
            if _is_long(messages, how):
                return await self._within(self._renderers, lambda: self._rendering.run(render))
            return await self._within(self._renderers, lambda: isolated.render_async(messages, how))

    async def _render_here(self, render: Callable[[], str]) -> str:
        """In a thread always: how long a template loops is no matter of how long a message is."""
        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._rendering.run_within(TEMPLATE_S, render)
        except Overrun:
            late = f"the chat template took longer than {TEMPLATE_S:g} s of CPU time"
            raise wrong("messages", late) from None
        except (NoThread, TimeoutError):  # others have all the threads: no fault of these messages
            raise _busy() from None

    async def _within(self, places: anyio.CapacityLimiter, work: Callable[[], Awaitable[T]]) -> T:
        """Work in a helper process, of which each model has a few."""
        try:
            places.acquire_on_behalf_of_nowait(work)  # as a rule: waiting costs more than asking
        except anyio.WouldBlock:
            await self._place(places, work)
        try:
            return await work()
        finally:
            places.release_on_behalf_of(work)

    async def _place(self, places: anyio.CapacityLimiter, work: object) -> None:
        try:
            with anyio.fail_after(TOKENIZE_S):
                await places.acquire_on_behalf_of(work)
        except TimeoutError:
            raise _busy() from None

    async def _tokenize(self, work: Callable[[], T], size: int) -> T:
        if size <= _SHORT_LEN:
            return work()
        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._tokenizing.run(work)
        except TimeoutError:
            raise _busy() from None


@contextmanager
def _admitted(param: str) -> Iterator[None]:
    """What clients are told where the model's own files refuse a text. The text of their errors
    is not repeated.
    """
    try:
        yield
    except LimitExceeded as error:
        raise wrong(param, error.cause) from None
    except ChatTemplateError:
        refused = "the model's chat template does not admit them, or it has none"
        raise wrong(param, refused) from None
    except TextError:
        raise wrong(param, "the model's tokenizer does not admit it") from None
    except HelperUnavailable:
        raise _busy() from None


def _is_long(messages: Messages, how: Rendering) -> bool:
    """Too long to be packed on the loop; also where that is not known at a glance."""
    values = [value for message in messages for value in message.values() if value is not None]
    if how.tools or not all(isinstance(value, str) for value in values):
        return True
    return sum(map(len, values)) > _SHORT_CHARS


def _busy() -> ApiError:
    late = "the prompt could not be tokenised in time"
    return ApiError(503, late, code="tokenizer_busy", retry_after_s=RETRY_S)
