"""Which tokenizers encode in this process: those of published models, and none that could grow."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sagellm.runtime.models.folder import BUILT_IN, ModelError
from sagellm.runtime.models.harmless import (
    MAX_TOKEN_CHARS,
    TokenizerParts,
    check_decoder,
    encodes_harmlessly,
    read_parts,
)
from sagellm.runtime.models.pipelines import SPLITS, read_tokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def made(model: Any = None, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False),
        ]
    )


def _template(num_special: int, num_texts: int = 1) -> processors.PostProcessor:
    single = " ".join(["<s>"] * num_special + ["$A"] * num_texts)
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])


PUBLISHED = {
    "GPT-2": {
        "pre_tokenizer": pre_tokenizers.ByteLevel(),
        "post_processor": processors.ByteLevel(),
    },
    **{
        f"split {number}": {
            "normalizer": normalizers.NFC(),
            "pre_tokenizer": _split(pattern),
            "post_processor": processors.Sequence([processors.ByteLevel(), _template(1)]),
        }
        for number, pattern in enumerate(sorted(SPLITS))
    },
    "Llama 2": {
        "normalizer": normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        ),
        "post_processor": _template(1),
    },
    "BERT": {
        "model": models.WordPiece(unk_token="[UNK]"),
        "normalizer": normalizers.BertNormalizer(),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
    },
}

GROWING = {
    "regex": {"pre_tokenizer": pre_tokenizers.Split(Regex("(a+)+b"), "isolated")},
    "regex inside": {"pre_tokenizer": _split("(a+)+b")},
    "replaced by a regex": {"normalizer": normalizers.Replace(Regex(""), "aaa")},
    "replaced by more": {"normalizer": normalizers.Replace("a", "a" * 99)},
    "replaced again and again": {
        "normalizer": normalizers.Sequence([normalizers.Replace("a", "aaaa")] * 4)
    },
    "prepended": {"normalizer": normalizers.Prepend("a" * 99)},
    "nested": {
        "normalizer": normalizers.Sequence(
            [normalizers.Sequence([normalizers.Replace("a", "a" * 9)])] * 3
        )
    },
    "many parts": {"normalizer": normalizers.Sequence([normalizers.Lowercase()] * 17)},
    "special tokens": {"post_processor": _template(65)},
    "the text twice": {"post_processor": _template(0, num_texts=2)},
    "Unigram": {"model": models.Unigram()},
    "long words": {"model": models.WordPiece(unk_token="u", max_input_chars_per_word=10**9)},
    "long prefix": {"model": models.BPE(continuing_subword_prefix="a" * 99)},
}


@pytest.mark.parametrize("parts", PUBLISHED.values(), ids=PUBLISHED)
def test_tokenizers_of_published_models_are_harmless(parts: dict[str, Any]) -> None:
    assert encodes_harmlessly(made(**parts))


def test_the_tokenizer_of_sage_tiny_is_harmless() -> None:
    tokenizer = read_tokenizer(str(BUILT_IN["sage-tiny"] / "tokenizer.json"))
    assert encodes_harmlessly(tokenizer)
    check_decoder("m", tokenizer)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace(Regex("a"), "")},
        {"pre_tokenizer": _split("a")},
        {"decoder": decoders.Sequence([decoders.Replace(Regex("a"), "")])},
        {"normalizer": normalizers.Prepend("a" * 99)},
    ],
)
def test_what_a_helper_loads_first(tmp_path: Path, parts: dict[str, Any]) -> None:
    """Unknown regular expressions, and normalizers that make added tokens grow."""
    assert not _read(tmp_path, made(**parts)).loads_harmlessly
    assert _read(tmp_path, made(pre_tokenizer=_split(min(SPLITS)))).loads_harmlessly


def _read(folder: Path, tokenizer: Tokenizer) -> TokenizerParts:
    file = folder / "tokenizer.json"
    file.write_text(tokenizer.to_str())
    return read_parts("m", file)


LONGEST = MAX_TOKEN_CHARS
CHARACTERS = ["a", "\\", '"', "\x01", "\u00e9", "\N{GRINNING FACE}"]


@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("character", CHARACTERS)
def test_a_token_is_measured_in_characters(tmp_path: Path, character: str, is_ascii: bool) -> None:
    file = tmp_path / "tokenizer.json"
    for size in (LONGEST, LONGEST + 1):
        numbers = dict.fromkeys((*"ab\\", character * size), 0)
        for vocab in (numbers, list(numbers.items())):
            file.write_text(json.dumps({"model": {"vocab": vocab}}, ensure_ascii=is_ascii))
            if size == LONGEST:
                read_parts("m", file)
                continue
            with pytest.raises(ModelError, match=f"has a token of {size} characters"):
                read_parts("m", file)


def test_a_long_vocabulary_of_short_tokens_that_end_in_backslashes_is_read(tmp_path: Path) -> None:
    vocab = {f"{number}\\": number for number in range(LONGEST)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    read_parts("m", tmp_path / "tokenizer.json")


@pytest.mark.parametrize("parts", GROWING.values(), ids=GROWING)
def test_what_may_grow_or_take_its_time_is_not(parts: dict[str, Any]) -> None:
    assert not encodes_harmlessly(made(**parts))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Metaspace(),
        decoders.WordPiece(),
        decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        None,
    ],
)
def test_decoders_of_published_models_are_taken(decoder: Any) -> None:
    check_decoder("m", made(decoder=decoder) if decoder else made())


@pytest.mark.parametrize(
    "decoder",
    [decoders.Replace("", "a"), decoders.Sequence([decoders.Replace("a", "a" * 9)] * 2)],
)
def test_decoders_that_grow_are_not(decoder: Any) -> None:
    with pytest.raises(ModelError, match="may multiply texts"):
        check_decoder("m", made(decoder=decoder))


def test_a_panic_of_the_library_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    held = json.loads(made(normalizer=normalizers.Replace(Regex("(a+)+b"), "")).to_str())
    token = AddedToken("a" * 60).__getstate__()
    held["added_tokens"] = [{**token, "normalized": True, "special": False, "id": 0}]
    file.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="retry-limit"):
        read_tokenizer(str(file))
