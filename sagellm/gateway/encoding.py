"""Encodes prompts without stalling the event loop: long work runs in bounded worker threads.

Templates and tokenizers that come with a model may never end. They run in a helper process
(`runtime/models/sandbox.py`).
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeVar

import anyio

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.threads import NoThread, Overrun, WorkerThreads
from sagellm.runtime.models import HelperUnavailable, LimitExceeded, TextError
from sagellm.runtime.models.chat import DEFAULT_RENDERING, ChatTemplateError, Rendering
from sagellm.runtime.models.sandbox import MAX_IDLE
from sagellm.runtime.models.tokenizer import Messages, Tokenizer, bad_words_token_ids
from sagellm.session.requests import Encoded

TEMPLATE_S = 0.25  # CPU time to render one conversation; more is refused as the messages' fault
TOKENIZE_S = 60.0  # wall time with the wait for a thread; more means an overloaded server
RETRY_S = 1.0
_SHORT_LEN = 2048  # characters or tokens; up to here, waking a thread costs more than the work
_SHORT_CHARS = 16384  # up to here, packing the text for a helper process does not stall the loop
_CHARS_A_TOKEN = 16  # few texts have more characters for each token
_NUM_THREADS = 4  # threads for rendering and for tokenizing; late work keeps its thread
T = TypeVar("T")


class PromptEncoder:
    """Encodes the prompts of one model. Works on trio and on asyncio."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rendering = WorkerThreads(_NUM_THREADS)
        self._tokenizing = WorkerThreads(_NUM_THREADS)

    @cached_property
    def _renderers(self) -> anyio.CapacityLimiter:
        """Limits how many helper processes render at once. Made on the loop that uses it."""
        return anyio.CapacityLimiter(MAX_IDLE)

    @cached_property
    def _encoders(self) -> anyio.CapacityLimiter:
        """Limits how many helper processes tokenize at once."""
        return anyio.CapacityLimiter(MAX_IDLE)

    async def variables(self) -> frozenset[str]:
        """Return the names of variables that the chat template reads; none if it is broken."""
        isolated = self._tokenizer.isolated_template
        if isolated is None:
            return self._tokenizer.chat_variables
        with _admitted("messages"):
            return await isolated.variables_async()

    async def text(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[int, ...]:
        """Return the tokens of a text. `param` is the request's field that errors name.

        Raises ApiError if the tokenizer rejects the text or takes too long.
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

    async def texts(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, param: str = "input"
    ) -> list[tuple[int, ...]]:
        """Return the tokens of each text. Raises ApiError as `text` does."""

        def encode() -> list[tuple[int, ...]]:
            return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

        if not texts:
            return []
        if self._tokenizer.isolated_encoder is None:
            return await self._tokenize(encode, sum(map(len, texts)))
        if len(texts) == 1:
            only = await self.text(texts[0], add_special_tokens=add_special_tokens, param=param)
            return [only]
        with _admitted(param):
            return await self._within(self._encoders, lambda: self._tokenizing.run(encode))

    async def exceeds(self, text: str, max_len: int, *, param: str = "prompt") -> bool:
        """Whether the beginning of a text has more than 2 * `max_len` tokens.

        False is no promise: the rest of the text is not looked at. Raises ApiError as `text` does.
        """
        # Tokens at the cut may change with the rest of the text, so the bound is twice `max_len`.
        beginning = text[: _CHARS_A_TOKEN * max_len]
        if len(beginning) == len(text):
            return False
        return len(await self.text(beginning, param=param)) > 2 * max_len

    async def ids(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens. Raises ApiError if decoding takes too long."""

        def decode() -> str:
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await self._tokenize(decode, len(token_ids))

    async def spelt(self, token_ids: tuple[int, ...]) -> list[str]:
        """Return the vocabulary's string for each token. Raises ApiError as `ids` does."""

        def spell() -> list[str]:
            return [self._tokenizer.token(token_id) for token_id in token_ids]

        return await self._tokenize(spell, len(token_ids))

    async def banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences of bad words. Raises ApiError as `text` does."""

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
    ) -> Encoded:
        """Return the prompt of a conversation, as text and tokens. Raises ApiError as `render`."""
        text = await self.render(messages, how)
        token_ids = await self.text(text, add_special_tokens=add_special_tokens, param="messages")
        return Encoded(text, token_ids)

    async def render(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        """Return the text of a conversation, rendered by the model's chat template.

        Raises ApiError if the template rejects the messages or takes too long.
        """

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
        """Render in a thread of this process, within TEMPLATE_S of CPU time."""
        # Always in a thread: a template may loop for long over a short message.
        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._rendering.run_within(TEMPLATE_S, render)
        except Overrun:
            late = f"the chat template took longer than {TEMPLATE_S:g} s of CPU time"
            raise wrong("messages", late) from None
        except (NoThread, TimeoutError):
            # Other calls occupy all threads: these messages are not at fault.
            raise _busy() from None

    async def _within(self, places: anyio.CapacityLimiter, work: Callable[[], Awaitable[T]]) -> T:
        """Do work in a helper process, after a wait for a place if all helpers are busy."""
        try:
            # A place is usually free, and this call is cheaper than the awaitable one.
            places.acquire_on_behalf_of_nowait(work)
        except anyio.WouldBlock:
            await self._place(places, work)
        try:
            return await work()
        finally:
            places.release_on_behalf_of(work)

    async def _place(self, places: anyio.CapacityLimiter, work: object) -> None:
        """Wait for a place. Raises ApiError 503 after TOKENIZE_S."""
        try:
            with anyio.fail_after(TOKENIZE_S):
                await places.acquire_on_behalf_of(work)
        except TimeoutError:
            raise _busy() from None

    async def _tokenize(self, work: Callable[[], T], size: int) -> T:
        """Do short work on the loop, and long work in a thread. `size`: characters or tokens."""
        if size <= _SHORT_LEN:
            return work()
        try:
            with anyio.fail_after(TOKENIZE_S):
                return await self._tokenizing.run(work)
        except TimeoutError:
            raise _busy() from None


@contextmanager
def _admitted(param: str) -> Iterator[None]:
    """Turn errors of the model's template and tokenizer into ApiError for the field `param`."""
    # The texts of these errors are not shown, because they may quote the prompt.
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
    """Whether packing the messages for a helper process could stall the loop.

    True also for messages whose length is not known without a walk through their values.
    """
    values = [value for message in messages for value in message.values() if value is not None]
    if how.tools or not all(isinstance(value, str) for value in values):
        return True
    return sum(map(len, values)) > _SHORT_CHARS


def _busy() -> ApiError:
    late = "the prompt could not be tokenised in time"
    return ApiError(503, late, code="tokenizer_busy", retry_after_s=RETRY_S)
