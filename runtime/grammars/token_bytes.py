"""The vocabulary of a model as llguidance reads it: the bytes of each token."""

from collections.abc import Iterable

from llguidance import LLTokenizer, TokenizerWrapper

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.models.tokenizer import Tokenizer

_MARKER = b"\xff"  # llguidance marks special tokens with it; no UTF-8 text has this byte
_MAX_TOKEN_BYTES = 1000  # llguidance panics at 1025
_NUM_TRIED = 64


def open_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
) -> LLTokenizer:
    """The tokens of a model with `vocab_size` logits. Takes about a second for 150,000 tokens, half
    of it in one call that holds Python's lock.

    The id `vocab_size` is a token that no model has. It ends a text for llguidance, so that the
    model's own end tokens can be allowed or not. Raises GrammarError if the tokens have no bytes of
    their own, as those of WordPiece.
    """
    special = tokenizer.special_token_ids | eos_token_ids
    known = range(min(tokenizer.vocab_size, vocab_size))
    tokens = [
        tokenizer.token(index).encode() if index in special else tokenizer.token_bytes(index)
        for index in known
    ]
    _check_spelling(tokenizer, [index for index in known if index not in special], tokens)
    tokens += [b""] * (vocab_size - len(tokens))
    return vocabulary_of(tokens, [index for index in special if index < vocab_size])


def vocabulary_of(tokens: list[bytes], special: Iterable[int]) -> LLTokenizer:
    """The vocabulary of `tokens`, and a last one that ends a text. An empty token is never allowed.
    Only grammars that name them allow the tokens `special`.
    """
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, special)))


class _Vocabulary:
    """The attributes that TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: Iterable[int]) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*(token if _is_usable(token) else b"" for token in tokens), b"<end>"]
        self.special_token_ids = [*special, self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no text is forced, so none is encoded")


def _is_usable(token: bytes) -> bool:
    return _MARKER not in token and len(token) <= _MAX_TOKEN_BYTES


def _check_spelling(tokenizer: Tokenizer, plain: list[int], tokens: list[bytes]) -> None:
    """Raise GrammarError if the decoder makes other texts of tokens than their bytes."""
    texts = {
        index: text
        for index in plain[:: len(plain) // _NUM_TRIED + 1]
        if (text := (2 * tokens[index].decode(errors="ignore")).strip())
    }
    wrong = [
        index for index, text in texts.items() if tokenizer.decode([index, index]).strip() != text
    ]
    if 2 * len(wrong) > len(texts):
        raise GrammarError("the tokenizer of this model writes tokens that no grammar can follow")
