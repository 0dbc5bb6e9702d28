"""How a tokenizer cuts text, by its class: as transformers 5 does, whatever tokenizer.json says.

`AutoTokenizer` of transformers chooses a class by `model_type` and `tokenizer_class`. Some classes
replace the normalizer, the pre-tokenizer and the decoder of tokenizer.json by their own. A model
must be given the same tokens here. Source: transformers 5.23, `Qwen2Tokenizer`, `LlamaTokenizer`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from sagellm.runtime.models import FolderWarning

AS_STORED, QWEN, LLAMA = "TokenizersBackend", "Qwen2Tokenizer", "LlamaTokenizer"
# The fields of config.json, and of tokenizer_config.json, that are read here.
MODEL_FIELDS = ("model_type", "tokenizer_class")
FIELDS = ("tokenizer_class", "add_prefix_space", "legacy")
_STORED_CLASSES = ("PreTrainedTokenizer", "PythonBackend", AS_STORED)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How published models cut text, by regular expressions that take time in proportion to it: Qwen2,
# and Llama 3 with up to three digits a number.
SPLITS = frozenset({_QWEN_SPLIT, _QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")})


def read_tokenizer(path: str) -> Tokenizer:
    """A tokenizer.json as it is, but that it neither cuts nor pads texts.

    Raises ValueError. A panic of the library, which is no Exception, is one of them.
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

    `model` names it in warnings, `model_config` is that of config.json, `config` that of
    tokenizer_config.json. A warning says where transformers may read text otherwise.
    """
    named = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    is_byte_level = any(
        "ByteLevel(" in repr(part) for part in (tokenizer.pre_tokenizer, tokenizer.decoder)
    )
    chosen = class_name(model_config.get("model_type"), named, is_byte_level)
    if chosen == AS_STORED:
        return ()
    if chosen not in _PIPELINES:
        fix = f'set tokenizer_class to "{AS_STORED}" in tokenizer_config.json'
        return (_other_in_transformers(model, chosen, f"if that is right, {fix}"),)
    if not isinstance(tokenizer.model, BPE) or is_byte_level != (chosen == QWEN):
        fix = "see that tokenizer.json is the one that the model was published with"
        return (_other_in_transformers(model, chosen, fix),)
    _PIPELINES[chosen](tokenizer, config)
    tokenizer.add_tokens([])  # else tokenizers 0.21 looks for added tokens as the old one made them
    return ()


def class_name(model_type: object, named: object, is_byte_level: bool) -> str:
    """The class that AutoTokenizer chooses; AS_STORED reads tokenizer.json as it is."""
    given = named.removesuffix("Fast") if isinstance(named, str) else ""
    if model_type == "qwen2":
        return QWEN
    if model_type == "mistral" or given in _STORED_CLASSES:
        return AS_STORED
    if not given:
        return QWEN if model_type == "qwen3" else AS_STORED
    return AS_STORED if given == LLAMA and is_byte_level else given


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
    """What the classes of transformers make of vocabulary and merges."""
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
