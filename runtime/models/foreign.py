"""The text side of a model whose engine encodes prompts itself: no token of it is known here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sagellm.runtime.models.chat import ANSWERED, ChatTemplateError, Rendering
from sagellm.runtime.models.fault import FolderWarning
from sagellm.runtime.models.isolated import IsolatedEncoder, IsolatedTemplate
from sagellm.runtime.models.tokenizer import Messages


class ForeignTokenizer:
    """Implements Tokenizer: every text has no tokens, and there is no chat template."""

    eos_token_ids: tuple[int, ...] = ()
    warnings: tuple[FolderWarning, ...] = ()
    isolated_template: IsolatedTemplate | None = None
    isolated_encoder: IsolatedEncoder | None = None
    vocab_size = 0
    special_tokens: Mapping[str, str] = {}
    chat_template: str | None = None
    chat_variables: frozenset[str] = frozenset()

    @contextmanager
    def kept(self) -> Iterator[None]:
        yield

    def token(self, token_id: int) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return ()

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        return [() for _ in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""

    def apply_chat_template(self, messages: Messages, how: Rendering = ANSWERED) -> str:
        raise ChatTemplateError(
            "the engine of this model has its own chat template, which is not known here; "
            "give a plain prompt instead"
        )

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        return self.encode(self.apply_chat_template(messages))
