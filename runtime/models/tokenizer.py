"""Text to token ids and back: the model's tokenizer.json, special tokens and chat template."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import msgspec
import tokenizers

from sagellm.runtime.models.chat import (
    ANSWERED,
    TEMPLATE_FILE,
    ChatTemplate,
    ChatTemplateError,
    Rendering,
    find_template,
)
from sagellm.runtime.models.fault import FolderWarning
from sagellm.runtime.models.folder import ModelError, ModelFolder
from sagellm.runtime.models.pipelines import set_pipeline

Messages = Sequence[Mapping[str, Any]]

_TOKENS, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_FILES = (_TOKENS, _CONFIG, TEMPLATE_FILE)

_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte
_WORD_BEGINS = "\N{LOWER ONE EIGHTH BLOCK}"  # its spelling of the space before a word


def _byte_level() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_level()


class Tokenizer(Protocol):
    """What prompts and answers need of a model's tokenizer."""

    eos_token_ids: tuple[int, ...]
    warnings: tuple[FolderWarning, ...]

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Their text by role ("eos_token"), as far as the model names them."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Its Jinja text, if there is one."""
        ...

    def token(self, token_id: int) -> str:
        """How the vocabulary spells it; "" where it has no such token."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What it adds to a text, which may be a part of a character."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    @property
    def chat_variables(self) -> frozenset[str]:
        """The names that its chat template reads beside what every template is given."""
        ...

    def apply_chat_template(self, messages: Messages, how: Rendering = ANSWERED) -> str:
        """The prompt of a conversation. Raises ChatTemplateError."""
        ...

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        """Its tokens; the template brings its own special tokens. Raises ChatTemplateError."""
        ...


_LONG_CHARS = 4096  # `encode` of more would hold the GIL for milliseconds; a batch lets it go


class FolderTokenizer:
    """The tokenizer of a model folder. Raises ModelError where its files are damaged."""

    def __init__(self, folder: ModelFolder) -> None:
        self.eos_token_ids = folder.eos_token_ids
        self._name = folder.name
        self._tokenizer = _read_tokenizer(folder)
        assert folder.path is not None
        config = _read_config(folder)
        self.warnings = set_pipeline(self._tokenizer, folder, config)
        self.chat_template: str | None = find_template(folder.path, config)
        self.special_tokens: Mapping[str, str] = _special_tokens(config)
        self._template = (
            ChatTemplate(self.chat_template, self.special_tokens)
            if self.chat_template is not None
            else None
        )
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token_id in self._added:
            return token.encode()
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if byte := _FALLBACK.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(_WORD_BEGINS, " ").encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        if len(text) <= _LONG_CHARS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(batch[0].ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    @property
    def chat_variables(self) -> frozenset[str]:
        return self._template.variables if self._template is not None else frozenset()

    def apply_chat_template(self, messages: Messages, how: Rendering = ANSWERED) -> str:
        if self._template is None:
            raise ChatTemplateError(
                f"model {self._name} has no chat template; give a plain prompt instead"
            )
        return self._template.render(messages, how)

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)


class ByteTokenizer:
    """One token a UTF-8 byte: for the null model, whose tokens mean nothing."""

    eos_token_ids: tuple[int, ...] = ()
    warnings: tuple[FolderWarning, ...] = ()
    vocab_size = 256
    special_tokens: Mapping[str, str] = {}
    chat_template: str | None = None
    chat_variables: frozenset[str] = frozenset()

    def token(self, token_id: int) -> str:
        return f"<0x{token_id % 256:02X}>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 256])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token % 256 for token in token_ids).decode(errors="replace")

    def apply_chat_template(self, messages: Messages, how: Rendering = ANSWERED) -> str:
        text = "".join(f"{one['role']}: {one['content'] or ''}\n" for one in messages)
        return text.removesuffix("\n") if how.continue_final_message else text

    def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        return self.encode(self.apply_chat_template(messages))


# Whoever asks for the same files gets the same tokenizer as long as somebody keeps it: reading one
# takes tenths of a second. They are never changed, and a file that was is read again.
_tokenizers: "WeakValueDictionary[tuple[object, ...], FolderTokenizer]" = WeakValueDictionary()


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a checked folder. Raises ModelError."""
    if folder.path is None:
        return ByteTokenizer()
    key = (folder.name, folder.eos_token_ids, *(_state(folder.path / name) for name in _FILES))
    found = _tokenizers.get(key)
    if found is None:
        found = _tokenizers[key] = FolderTokenizer(folder)
    return found


def _state(file: Path) -> tuple[object, ...]:
    """What changes whenever the file does."""
    try:
        held = file.resolve().stat()
    except OSError:
        return (file,)
    return file, held.st_dev, held.st_ino, held.st_size, held.st_mtime_ns, held.st_ctime_ns


def _read_tokenizer(folder: ModelFolder) -> tokenizers.Tokenizer:
    path = folder.file(_TOKENS)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"model {folder.name}: {path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_config(folder: ModelFolder) -> dict[str, Any]:
    assert folder.path is not None
    path = folder.path / _CONFIG
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"model {folder.name}: {path} is not valid JSON: {error}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role ("bos_token"), given as text or as {"content": text}."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found
