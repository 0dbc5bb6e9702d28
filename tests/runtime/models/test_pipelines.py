"""Tokenizers whose class and tokenizer.json differ: transformers' tokens, or a warning."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from logged import logged
from models_on_the_fly import TEXT, make_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from sagellm import Graph
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.pipelines import AS_STORED, LLAMA, QWEN
from sagellm.runtime.models.tokenizer import load_tokenizer

CORPUS = [*TEXT, "don't 12345 3.14 they'll"] * 3
TEXTS = [
    "don't 12345 gr\u00f6\u00dfer e\u0301 \u212b \u65e5\u672c\u8a9e a  b\n\n c",
    *(
        " lead",
        "a<|eos|>b",
        "x</s> y",
        "the quick dogs \u6f22\u5b57",
        "<s>[INST] hi [/INST]",
        "the <x> quick<x>fox",
        "12345  ",
    ),
]
STORED = "PreTrainedTokenizer"
SPACE = "\u2581"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"


def trained(tokenizer: Tokenizer, *special: str) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not special else []
    trainer = BpeTrainer(
        vocab_size=560, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|eos|>"])
    tokenizer.add_tokens([AddedToken("<x>", normalized=True)])
    return tokenizer


def plain() -> Tokenizer:
    """Byte-level, as GPT-2 cuts text; a space begins each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


def numbers() -> Tokenizer:
    """Byte-level, numbers in threes, whole words first, as Llama 3."""
    tokenizer = Tokenizer(BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CONTRACTIONS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    stored = json.loads(trained(tokenizer).to_str())
    del stored["model"]["merges"][-100:]  # words that no merge makes
    return Tokenizer.from_str(json.dumps(stored))


def sentencepiece() -> Tokenizer:
    """As Llama 2: a space before each part of a text, by a normalizer; no bytes where it knows no
    character.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained(tokenizer, "<unk>", "<s>", "</s>", *fallback)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "plain": plain,
    "numbers": numbers,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    return {name: make().to_str() for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("llama", "mistral", "qwen2", "qwen3")
    return {
        family: make_model(family, tmp_path_factory.mktemp(family), vocab_size=1000)
        for family in families
    }


@pytest.fixture
def write(made: dict[str, Path], kinds: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of a family with that tokenizer.json and tokenizer_config.json."""

    def folder(family: str, kind: str, **config: object) -> Path:
        for file in made[family].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "tokenizer.json").write_text(kinds[kind])
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return folder


def differing(folder: Path) -> list[str]:
    """The texts that we and transformers read or write differently."""
    ours = load_tokenizer(resolve_model(str(folder)))
    theirs = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        for special in (True, False):
            right = theirs.encode(text, add_special_tokens=special)
            is_same = list(ours.encode(text, add_special_tokens=special)) == right
            written = theirs.decode(right, skip_special_tokens=special)
            if not is_same or ours.decode(right, skip_special_tokens=special) != written:
                found.append(text)
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "named",
    [None, QWEN, f"{QWEN}Fast", LLAMA, f"{LLAMA}Fast", f"{STORED}Fast", AS_STORED],
)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_transformers(
    family: str, named: str | None, kind: str, write: Callable[..., Path]
) -> None:
    config = {} if named is None else {"tokenizer_class": named}
    folder = write(family, kind, **config)
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    if tokenizer.warnings:  # a class that this vocabulary does not fit
        assert kind == "sentencepiece"
        assert type(AutoTokenizer.from_pretrained(folder)).__name__ == QWEN
    else:
        assert differing(folder) == []


@pytest.mark.parametrize("options", [{"legacy": True}, {"legacy": None}, {"legacy": False}])
@pytest.mark.parametrize("space", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
@pytest.mark.parametrize(
    ("family", "named", "kind"),
    [("llama", LLAMA, "sentencepiece"), ("qwen2", None, "plain"), ("qwen3", QWEN, "numbers")],
)
def test_options_of_a_class_are_obeyed(
    family: str,
    named: str | None,
    kind: str,
    space: dict[str, object],
    options: dict[str, object],
    write: Callable[..., Path],
) -> None:
    folder = write(family, kind, tokenizer_class=named, **space, **options)
    assert differing(folder) == []


def test_the_class_may_stand_in_config_json(write: Callable[..., Path]) -> None:
    folder = write("qwen3", "numbers")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert differing(folder) == []


def test_the_class_decides(write: Callable[..., Path]) -> None:
    """The pipelines of class and file differ in tokens: the tests above compare something."""
    text, found = "12345", []
    for named in (QWEN, AS_STORED):
        folder = write("qwen3", "numbers", tokenizer_class=named)
        found.append(load_tokenizer(resolve_model(str(folder))).encode(text))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("family", "kind", "named", "shown"),
    [
        ("qwen3", "plain", "GPT2TokenizerFast", "GPT2Tokenizer"),
        ("qwen2", "sentencepiece", None, QWEN),
    ],
)
async def test_another_reading_in_transformers_is_one_warning(
    family: str,
    kind: str,
    named: str | None,
    shown: str,
    write: Callable[..., Path],
) -> None:
    folder = write(family, kind, tokenizer_class=named)
    stored = Tokenizer.from_str(KINDS[kind]().to_str())
    with logged() as lines:
        async with Graph.load("pd").open(model=str(folder)) as session:
            encoded = session.encode(TEXTS[0])
    assert list(encoded.token_ids) == stored.encode(TEXTS[0]).ids
    (line,) = [line for line in lines if line["event"] == "tokenizer_as_stored"]
    assert shown in line["cause"]
    assert line["fix"]


def test_a_unigram_vocabulary_is_read_as_stored(write: Callable[..., Path]) -> None:
    folder = write("llama", "plain", tokenizer_class=LLAMA)
    vocabulary = [("<unk>", 0.0), (f"{SPACE}a", -1.0), ("b", -2.0)]
    Tokenizer(Unigram(vocabulary, 0)).save(str(folder / "tokenizer.json"))
    assert load_tokenizer(resolve_model(str(folder))).warnings


@pytest.mark.parametrize("name", ["sage-tiny", "null"])
def test_what_ships_warns_of_nothing(name: str) -> None:
    assert load_tokenizer(resolve_model(name)).warnings == ()
