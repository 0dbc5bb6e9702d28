"""The tokenizer pipelines that transformers 5 sets by class, even if tokenizer.json has others.

`AutoTokenizer` of transformers chooses a class by `model_type` and `tokenizer_class`. Some classes
replace the normalizer, the pre-tokenizer and the decoder of tokenizer.json. sagellm does the same,
so that a text has the same tokens. Source: transformers 5.23, `Qwen2Tokenizer`, `LlamaTokenizer`,
`BertTokenizer`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from sagellm.runtime.models import FolderWarning
from sagellm.runtime.models.helper_process import (
    EncodedTokens,
    EncodeWork,
    HelperJob,
    JobWorker,
    RenderWork,
    TokenizerJob,
)

AS_STORED, QWEN, LLAMA = "TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizer"
BERT = "BertTokenizer"
# The fields of config.json, and of tokenizer_config.json, that choose a pipeline.
MODEL_FIELDS = ("model_type", "tokenizer_class")
_OF_BERT = ("do_lower_case", "tokenize_chinese_chars", "strip_accents")
FIELDS = ("tokenizer_class", "add_prefix_space", "legacy", *_OF_BERT)
_STORED_CLASSES = ("PreTrainedTokenizer", "PythonBackend", AS_STORED)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Regular expressions of published models that take time linear in the text: that of Qwen2, and that
# of Llama 3, which takes up to three digits at a time.
SPLITS = frozenset({_QWEN_SPLIT, _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")})


def read_tokenizer(path: str) -> Tokenizer:
    """Read a tokenizer.json, and switch off truncation and padding.

    Raises ValueError, also if the library panics: its PanicException is not an Exception.
    """
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def set_pipeline(
    tokenizer: Tokenizer,
    model: str,
    model_config: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[FolderWarning, ...]:
    """Give a tokenizer that was read from tokenizer.json the pipeline of its class.

    `model`: its name in warnings. `model_config`: fields of config.json. `config`: fields of
    tokenizer_config.json. Returns a warning if transformers may encode texts to other tokens.
    """
    named = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    is_byte_level = any(
        "ByteLevel(" in repr(part) for part in (tokenizer.pre_tokenizer, tokenizer.decoder)
    )
    chosen = class_name(model_config.get("model_type"), named, is_byte_level)
    if chosen == AS_STORED:
        return ()
    if chosen == BERT and isinstance(tokenizer.model, WordPiece):
        _bert(tokenizer, config)
        return ()
    if chosen not in _PIPELINES:
        fix = f'set tokenizer_class to "{AS_STORED}" in tokenizer_config.json'
        return (_other_in_transformers(model, chosen, f"if that is right, {fix}"),)
    if not isinstance(tokenizer.model, BPE) or is_byte_level != (chosen == QWEN):
        fix = "see that tokenizer.json is the one that the model was published with"
        return (_other_in_transformers(model, chosen, fix),)
    _PIPELINES[chosen](tokenizer, config)
    tokenizer.add_tokens(
        []
    )  # otherwise tokenizers 0.21 matches added tokens as the old normalizer wrote them
    return ()


def class_name(model_type: object, named: object, is_byte_level: bool) -> str:
    """The name of the class that AutoTokenizer chooses; AS_STORED: tokenizer.json is used
    unchanged.
    """
    given = named.removesuffix("Fast") if isinstance(named, str) else ""
    if model_type == "qwen2":
        return QWEN
    if model_type == "mistral" or given in _STORED_CLASSES:
        return AS_STORED
    if not given:
        return QWEN if model_type == "qwen3" else AS_STORED
    return AS_STORED if given == LLAMA and is_byte_level else given


def _bert(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    lowercase, chinese, accents = (config.get(name) for name in _OF_BERT)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=lowercase is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_tokens([])  # as in `set_pipeline`


def _qwen(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    begins_with_space = bool(config.get("add_prefix_space"))
    _set_model(tokenizer, with_bytes=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=begins_with_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _llama(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    begins_with_space = config.get("add_prefix_space", True) is not False
    everywhere = "always" if config.get("legacy") else "first"
    _set_model(tokenizer, with_bytes=True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        _SPACE, everywhere if begins_with_space else "never", split=False
    )
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins_with_space:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)


def _set_model(tokenizer: Tokenizer, *, with_bytes: bool) -> None:
    """Set the model options that the classes of transformers set."""
    model = tokenizer.model
    model.unk_token = None
    model.fuse_unk = model.byte_fallback = with_bytes
    model.ignore_merges = False


_PIPELINES: dict[str, Callable[[Tokenizer, Mapping[str, Any]], None]] = {
    QWEN: _qwen,
    LLAMA: _llama,
}


def _other_in_transformers(model: str, chosen: str, fix: str) -> FolderWarning:
    cause = f"text is read as tokenizer.json says; transformers may read it otherwise, as {chosen}"
    return FolderWarning("tokenizer_as_stored", model, cause, fix)


_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte


def _byte_level() -> dict[str, int]:
    """Printable character -> the byte that it stands for in byte-level BPE (GPT-2,
    `bytes_to_unicode`).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_level()


def spelled_bytes(token: str, *, is_byte_level: bool) -> bytes:
    """The bytes that a token of the vocabulary adds to a text, perhaps a part of a character."""
    if is_byte_level and all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    if byte := _FALLBACK.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace(_SPACE, " ").encode()


class _EncodeWorker:
    """Encodes texts by one tokenizer.json, in a helper process. Implements JobWorker."""

    variables = ()

    def __init__(self, job: TokenizerJob) -> None:
        self._tokenizer = read_tokenizer(job.path)
        set_pipeline(self._tokenizer, job.path, job.model_config, job.tokenizer_config)

    def answer(self, work: RenderWork | EncodeWork) -> EncodedTokens:
        assert isinstance(work, EncodeWork)
        batch = self._tokenizer.encode_batch_fast(
            list(work.texts), add_special_tokens=work.add_special_tokens
        )
        return EncodedTokens(tuple(tuple(each.ids) for each in batch))


NEEDS = ()  # modules that `open_job` imports by name


def open_job(job: HelperJob) -> JobWorker:
    """Read the tokenizer of a job. Called in a helper process."""
    assert isinstance(job, TokenizerJob)
    return _EncodeWorker(job)
