"""Chat templates and tokenizers that run in helper processes, within limits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sagellm.runtime.models import HelperUnavailable, LimitExceeded, ModelError, TextError
from sagellm.runtime.models.chat import (
    DEFAULT_RENDERING,
    ChatTemplateError,
    Rendering,
    check_messages,
    pack_conversation,
)
from sagellm.runtime.models.helper_process import (
    EncodedTokens,
    EncodeWork,
    HelperSetup,
    RenderedText,
    RenderWork,
    TemplateJob,
    TokenizerJob,
    WorkRefused,
    WorkRequest,
)
from sagellm.runtime.models.sandbox import Sandbox

RENDERER, ENCODER = (f"sagellm.runtime.models.{name}" for name in ("chat", "pipelines"))

RENDER_CPU_S, COMPILE_CPU_S = 0.25, 2.0
RENDER_BYTES = 256 << 20  # memory to compile, and to render
# The most bytes of a rendered text: the first, plus the second for each byte of messages.
_TEXT_BYTES, _TEXT_GROWTH = 4 << 20, 8

ENCODE_CPU_S, ENCODE_BYTES = 0.25, 256 << 20
_CPU_S_A_CHAR, _BYTES_A_CHAR = 5e-6, 256  # several times the cost of published tokenizers
_IDS_BYTES, _IDS_BYTES_A_CHAR = 1 << 20, 24  # a token takes 5, a character may be several tokens
_LOAD_CPU_S, _LOAD_CPU_S_A_BYTE = 2.0, 1e-6  # to read a tokenizer.json
_LOAD_BYTES_A_BYTE = 40  # memory for each byte of a tokenizer.json


class IsolatedTemplate:
    """Renders a chat template in a helper process."""

    def __init__(self, model: str, text: str, special_tokens: Mapping[str, str]) -> None:
        setup = HelperSetup(TemplateJob(text, dict(special_tokens)), RENDER_BYTES, COMPILE_CPU_S)
        self.sandbox = Sandbox(RENDERER, setup, what="chat template", model=model)

    @property
    def variables(self) -> frozenset[str]:
        """The names that the template reads; empty if it cannot be compiled within limits. The call
        blocks the thread until a helper process has compiled the template.
        """
        try:
            return frozenset(self.sandbox.ready().variables)
        except TextError:
            return frozenset()

    async def variables_async(self) -> frozenset[str]:
        """The same as `variables`, on trio or asyncio."""
        try:
            return frozenset((await self.sandbox.ready_async()).variables)
        except TextError:
            return frozenset()

    def render(
        self, messages: Sequence[Mapping[str, Any]], how: Rendering = DEFAULT_RENDERING
    ) -> str:
        """Render the prompt of a conversation. The call blocks the thread.

        Raises ChatTemplateError, LimitExceeded, HelperUnavailable.
        """
        return _text(self.sandbox.call(self.ask(messages, how)))

    async def render_async(
        self, messages: Sequence[Mapping[str, Any]], how: Rendering = DEFAULT_RENDERING
    ) -> str:
        """The same as `render`, on trio or asyncio. Only for short messages, which are encoded on
        the event loop.
        """
        return _text(await self.sandbox.ask(self.ask(messages, how)))

    @staticmethod
    def ask(
        messages: Sequence[Mapping[str, Any]], how: Rendering = DEFAULT_RENDERING
    ) -> WorkRequest:
        """Make the request to render a conversation, with its limits. Raises ChatTemplateError if
        the messages are not JSON.
        """
        check_messages(messages)
        given = pack_conversation(messages, how)
        growth = _TEXT_GROWTH * len(given)
        return WorkRequest(
            RenderWork(given), RENDER_CPU_S, RENDER_BYTES + 4 * growth, _TEXT_BYTES + growth
        )


class IsolatedEncoder:
    """Encodes texts by a tokenizer.json in a helper process."""

    def __init__(
        self, model: str, file: Path, model_config: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        job = TokenizerJob(str(file.resolve()), dict(model_config), dict(config))
        size = file.stat().st_size
        memory_bytes = ENCODE_BYTES + _LOAD_BYTES_A_BYTE * size
        setup = HelperSetup(job, memory_bytes, _LOAD_CPU_S + _LOAD_CPU_S_A_BYTE * size)
        self.sandbox = Sandbox(ENCODER, setup, what="tokenizer", model=model)

    def try_loading(self, model: str, file: Path) -> None:
        """Load the file in a helper process. Raises ModelError if that fails, or exceeds limits.

        The helper process then ends, because not every process that loads a tokenizer encodes
        texts.
        """
        fix = "see that it is the one that the model was published with"
        try:
            fault = self.sandbox.ready().fault
        except LimitExceeded as error:
            fault = f"it {error.limit}"
        except HelperUnavailable as error:
            fault, fix = str(error), "raise the limit of processes: ulimit -u"
        finally:
            self.sandbox.close()
        if fault:
            raise ModelError(f"model {model}: {file} cannot be read: {fault}", fix) from None

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        """The token ids of each text. The call blocks the thread. Raises TextError,
        HelperUnavailable.
        """
        return _token_ids(self.sandbox.call(self.ask(texts, add_special_tokens=add_special_tokens)))

    async def encode_async(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The token ids of a short text, on trio or asyncio. Raises the errors of `encode`."""
        reply = await self.sandbox.ask(self.ask((text,), add_special_tokens=add_special_tokens))
        return _token_ids(reply)[0]

    @staticmethod
    def ask(texts: Sequence[str], *, add_special_tokens: bool) -> WorkRequest:
        """Make the request to encode texts. Its limits grow with the number of characters."""
        num_chars = sum(map(len, texts))
        return WorkRequest(
            EncodeWork(tuple(texts), add_special_tokens),
            ENCODE_CPU_S + _CPU_S_A_CHAR * num_chars,
            ENCODE_BYTES + _BYTES_A_CHAR * num_chars,
            _IDS_BYTES + _IDS_BYTES_A_CHAR * num_chars,
        )


def _text(reply: RenderedText | EncodedTokens | WorkRefused) -> str:
    if isinstance(reply, WorkRefused):
        raise ChatTemplateError(reply.cause)
    assert isinstance(reply, RenderedText)
    return reply.text


def _token_ids(reply: RenderedText | EncodedTokens | WorkRefused) -> list[tuple[int, ...]]:
    if isinstance(reply, WorkRefused):
        raise TextError(f"the model's tokenizer refused the text: {reply.cause}")
    assert isinstance(reply, EncodedTokens)
    return list(reply.token_ids)
