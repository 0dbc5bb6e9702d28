"""Tokenizers: text to token ids and back, with special tokens and chat templates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from weakref import WeakValueDictionary

import msgspec
import tokenizers

from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.chat import (
    DEFAULT_RENDERING,
    TEMPLATE_FILE,
    ChatTemplate,
    ChatTemplateError,
    Rendering,
    find_template,
    special_tokens,
)
from sagellm.runtime.models.files import file_state
from sagellm.runtime.models.folder import ModelError, ModelFolder
from sagellm.runtime.models.harmless import (
    check_decoder,
    encodes_harmlessly,
    is_known_template,
    read_parts,
)
from sagellm.runtime.models.isolated import IsolatedEncoder, IsolatedTemplate
from sagellm.runtime.models.pipelines import (
    FIELDS,
    MODEL_FIELDS,
    read_tokenizer,
    set_pipeline,
    spelled_bytes,
)

Messages = Sequence[Mapping[str, Any]]

_TOKENS, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_FILES = (_TOKENS, _CONFIG, TEMPLATE_FILE)


class Tokenizer(Protocol):
    """Renders, encodes and decodes text for one model. A graph has one tokenizer for each model.

    If `isolated_template` or `isolated_encoder` is set, helper processes render or encode within
    limits; the methods here then block the thread, and may raise LimitExceeded. Decoding always
    runs in this process: folders with an unbounded decoder are refused.
    """

    eos_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]  # `decode` may skip them; they are no text
    warnings: tuple[FolderWarning, ...]
    isolated_template: IsolatedTemplate | None
    isolated_encoder: IsolatedEncoder | None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep helper processes ready during the `with` block, if the tokenizer needs any."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of each special token that the model names, by role ("eos_token")."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the chat template, if there is one."""
        ...

    def token(self, token_id: int) -> str:
        """The spelling of a token in the vocabulary; "": there is no such token."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, perhaps a part of a character."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The token ids of a text. Raises TextError if the tokenizer refuses the text, and
        HelperUnavailable.
        """
        ...

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        """The token ids of each text, within the limits of one call. Raises as `encode`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    @property
    def chat_variables(self) -> frozenset[str]:
        """The names that the chat template reads, without those that every template receives."""
        ...

    def apply_chat_template(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        """Render the prompt of a conversation. Raises ChatTemplateError."""
        ...

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        """The token ids of a conversation's prompt; the template adds special tokens itself. Raises
        ChatTemplateError.
        """
        ...


_LONG_CHARS = 4096  # for longer texts `encode` holds the GIL for milliseconds; a batch releases it


class FolderTokenizer:
    """The tokenizer of a model folder. Raises ModelError if its files are damaged."""

    def __init__(self, folder: ModelFolder) -> None:
        self.eos_token_ids = folder.eos_token_ids
        self._name = folder.name
        assert folder.path is not None
        config, file = _read_config(folder), folder.file(_TOKENS)
        pipeline = _chosen(folder.config, MODEL_FIELDS), _chosen(config, FIELDS)
        apart = IsolatedEncoder(folder.name, file, *pipeline)
        # A hostile file is loaded in a helper process first: a load here could exhaust memory.
        if not read_parts(folder.name, file).loads_harmlessly:
            apart.try_loading(folder.name, file)
        self._tokenizer = _read_tokenizer(folder)
        self.warnings = set_pipeline(self._tokenizer, folder.name, *pipeline)
        check_decoder(folder.name, self._tokenizer)
        self.isolated_encoder = None if encodes_harmlessly(self._tokenizer) else apart
        self.chat_template: str | None = find_template(folder.path, config)
        self.special_tokens: Mapping[str, str] = special_tokens(config)
        self._template = _template(folder.name, self.chat_template, self.special_tokens)
        self.isolated_template = (
            self._template if isinstance(self._template, IsolatedTemplate) else None
        )
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            token_id for token_id, token in self._added.items() if token.special
        )
        self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)

    @contextmanager
    def kept(self) -> Iterator[None]:
        with ExitStack() as kept:
            for isolated in (self.isolated_template, self.isolated_encoder):
                if isolated is not None:
                    kept.enter_context(isolated.sandbox.kept())
            yield

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token_id in self._added:
            return token.encode()
        return spelled_bytes(token, is_byte_level=self._is_byte_level)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        if self.isolated_encoder is not None:
            return self.encode_batch((text,), add_special_tokens=add_special_tokens)[0]
        if len(text) <= _LONG_CHARS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(batch[0].ids)

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        if self.isolated_encoder is not None:
            return self.isolated_encoder.encode(texts, add_special_tokens=add_special_tokens)
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    @property
    def chat_variables(self) -> frozenset[str]:
        return self._template.variables if self._template is not None else frozenset()

    def apply_chat_template(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        if self._template is None:
            raise ChatTemplateError(
                f"model {self._name} has no chat template; give a plain prompt instead"
            )
        return self._template.render(messages, how)

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)


class ByteTokenizer:
    """The tokenizer of the null model, whose tokens mean nothing: one token for each UTF-8 byte."""

    eos_token_ids: tuple[int, ...] = ()
    special_token_ids: frozenset[int] = frozenset()
    warnings: tuple[FolderWarning, ...] = ()
    isolated_template: IsolatedTemplate | None = None
    isolated_encoder: IsolatedEncoder | None = None
    vocab_size = 256
    special_tokens: Mapping[str, str] = {}
    chat_template: str | None = None
    chat_variables: frozenset[str] = frozenset()

    @contextmanager
    def kept(self) -> Iterator[None]:
        yield

    def token(self, token_id: int) -> str:
        return f"<0x{token_id % 256:02X}>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 256])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token % 256 for token in token_ids).decode(errors="replace")

    def apply_chat_template(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        text = "".join(f"{one['role']}: {one['content'] or ''}\n" for one in messages)
        return text.removesuffix("\n") if how.continue_final_message else text

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        return self.encode(self.apply_chat_template(messages))


class RemoteTokenizer(ByteTokenizer):
    """The tokenizer of a model whose engine encodes prompts itself. Every text has zero tokens, and
    there is no chat template.
    """

    vocab_size = 0

    def token(self, token_id: int) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return ()

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""

    def apply_chat_template(self, messages: Messages, how: Rendering = DEFAULT_RENDERING) -> str:
        raise ChatTemplateError(
            "the engine of this model has its own chat template, which is not known here; "
            "give a plain prompt instead"
        )


# Callers share the tokenizer of a folder while one of them holds it, because reading a tokenizer
# takes tenths of a second. A tokenizer never changes; if its files change, they are read again.
_tokenizers: "WeakValueDictionary[tuple[object, ...], FolderTokenizer]" = WeakValueDictionary()


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a checked folder. Raises ModelError."""
    if folder.path is None:
        return ByteTokenizer()
    key = (folder.name, folder.eos_token_ids, *(file_state(folder.path / name) for name in _FILES))
    found = _tokenizers.get(key)
    if found is None:
        found = _tokenizers[key] = FolderTokenizer(folder)
    return found


def _template(
    model: str, text: str | None, special_tokens: Mapping[str, str]
) -> ChatTemplate | IsolatedTemplate | None:
    if text is None:
        return None
    if is_known_template(text):
        return ChatTemplate(text, special_tokens)
    return IsolatedTemplate(model, text, special_tokens)


def _chosen(config: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    return {name: config[name] for name in fields if name in config}


def _read_tokenizer(folder: ModelFolder) -> tokenizers.Tokenizer:
    path = folder.file(_TOKENS)
    try:
        return read_tokenizer(str(path))
    except ValueError as error:
        raise ModelError(f"model {folder.name}: {path} cannot be read: {error}") from error


def _read_config(folder: ModelFolder) -> dict[str, Any]:
    assert folder.path is not None
    path = folder.path / _CONFIG
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"model {folder.name}: {path} is not valid JSON: {error}") from error


def bad_words_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences to ban for `words`. Each word is encoded twice: alone, and after a space.
    The second sequence is banned, too, if it is equally long and begins with another token.

    vLLM has the same rule, so that equal requests ban equal tokens.
    """
    found: list[tuple[int, ...]] = []
    bare = [word.lstrip() or word for word in words]
    texts = [text for word in bare for text in (word, f" {word}")]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False) if texts else []
    for plain, spaced in zip(encoded[::2], encoded[1::2], strict=True):
        found.append(plain)
        if plain[:1] != spaced[:1] and len(plain) == len(spaced):
            found.append(spaced)
    return tuple(token_ids for token_ids in found if token_ids)
