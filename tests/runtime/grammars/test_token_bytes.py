"""Vocabularies: byte-level BPE, SentencePiece's spelling, WordPiece, and the shipped model."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from grammar_walks import WalkTokenizer, allowed, json_tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compiled_grammar import open_vocabulary
from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from sagellm.runtime.sampling import Grammar

OBJECT = Grammar(
    kind="json_schema",
    text=json.dumps(
        {
            "type": "object",
            "properties": {"a b": {"enum": ["größer als", "日本語 x"]}, "n": {"type": "integer"}},
            "required": ["a b", "n"],
        }
    ),
)


def sentencepiece() -> WalkTokenizer:
    """A vocabulary as of Llama 2: words begin with \u2581, and other bytes are <0x00> to <0xFF>."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    text = ['{"a b": "x y", "n": 12}', "some words, größer", "true false null 0123456789"] * 5
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    spelled = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(spelled))}
    merges = [tuple(pair) for pair in model["merges"]]
    made = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.pre_tokenizer = trained.pre_tokenizer
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(special)
    return WalkTokenizer(made, is_byte_level=False)


def sage_tiny() -> Tokenizer:
    return load_tokenizer(resolve_model("sage-tiny"))


def walk(tokenizer: Tokenizer, eos: frozenset[int], grammar: Grammar) -> str:
    """A random answer. Its text is that of the tokens as the model's decoder writes them."""
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 3, eos)
    matcher, rng, output = (
        compiler.compile(grammar, "", ignores_eos=False),
        np.random.default_rng(5),
        [],
    )
    while not (choices := set(allowed(matcher, output).tolist())) & eos:
        output.append(int(rng.choice(sorted(choices))))
    return tokenizer.decode(output, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("tokenizer", "eos"),
    [
        (sentencepiece(), {2}),
        (sage_tiny(), {256, 257}),
        (json_tokenizer(), {json_tokenizer().vocab_size - 1}),
    ],
    ids=["sentencepiece", "sage-tiny", "byte-level"],
)
def test_random_answers_are_valid(tokenizer: Tokenizer, eos: set[int]) -> None:
    for _ in range(5):
        value = json.loads(walk(tokenizer, frozenset(eos), OBJECT))
        assert value["a b"] in ("größer als", "日本語 x")
        assert isinstance(value["n"], int)


def test_bytes_of_characters_are_tokens_of_their_own_with_byte_fallback() -> None:
    tokenizer = sentencepiece()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset([2]))
    matcher = compiler.compile(Grammar(kind="regex", text="日"), "", ignores_eos=False)
    output: list[int] = []
    for byte in "日".encode():
        assert tokenizer.token_bytes(allowed(matcher, output)[0]) == bytes([byte])
        output.append(int(allowed(matcher, output)[0]))
    assert allowed(matcher, output).tolist() == [2]


def test_special_tokens_of_the_shipped_model_can_be_named() -> None:
    tokenizer = sage_tiny()
    compiler = GrammarCompiler(tokenizer, 264, frozenset(tokenizer.eos_token_ids))
    matcher = compiler.compile(Grammar(kind="lark", text='start: <|user|> "x" <[260]>'), "",
                               ignores_eos=False)  # fmt: skip
    assert allowed(matcher, []).tolist() == [259]
    assert allowed(matcher, [259, *tokenizer.encode("x")]).tolist() == [260]


def test_an_end_token_is_no_text_even_if_it_is_not_marked_as_special() -> None:
    tokenizer = ByteTokenizer()
    compiler = GrammarCompiler(tokenizer, 256, frozenset(b"x"))
    matcher = compiler.compile(Grammar(kind="regex", text="[x-z]{2}"), "", ignores_eos=False)
    assert allowed(matcher, []).tolist() == list(b"yz")
    assert allowed(matcher, b"yz").tolist() == list(b"x")


def test_a_token_of_a_thousand_characters_is_never_allowed() -> None:
    class OneIsLong(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"a" * 1100 if token_id == 7 else super().token_bytes(token_id)

    compiler = GrammarCompiler(OneIsLong(), 256, frozenset())
    matcher = compiler.compile(Grammar(kind="regex", text="a{2000}"), "", ignores_eos=False)
    assert allowed(matcher, []).tolist() == [ord("a")]


def test_the_byte_that_marks_special_tokens_is_never_allowed() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), 256, frozenset())
    matcher = compiler.compile(Grammar(kind="lark", text="start: <[65-70]>"), "", ignores_eos=False)
    assert allowed(matcher, []).tolist() == list(range(65, 71))


class WordPiece(ByteTokenizer):
    """Its decoder writes other texts than the tokens have."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(f"#{token}" for token in token_ids)


def test_a_model_whose_tokens_have_no_bytes_is_refused() -> None:
    with pytest.raises(GrammarError, match="tokenizer of this model"):
        open_vocabulary(WordPiece(), 256, frozenset())
