"""The vocabulary of a model as llguidance reads it: the bytes of each token."""

from llguidance import LLTokenizer, TokenizerWrapper

from sagellm.runtime.models.tokenizer import Tokenizer

_MARKER = b"\xff"  # llguidance marks special tokens with it; no UTF-8 text has this byte


def open_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """The tokens of a model with `vocab_size` logits. Takes about a second for 150,000 tokens.

    The id `vocab_size` is a token that no model has. It ends a text for llguidance, so that the
    model's own end tokens can be allowed or not.
    """
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)), slices=None)


class _Vocabulary:
    """What TokenizerWrapper reads. An empty token is never allowed."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        num_tokens = min(tokenizer.vocab_size, vocab_size)
        special = tokenizer.special_token_ids
        known = [
            tokenizer.token(index).encode() if index in special else tokenizer.token_bytes(index)
            for index in range(num_tokens)
        ]
        known = [b"" if _MARKER in token else token for token in known]
        self.tokens = [*known, *[b""] * (vocab_size - num_tokens), b"<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*(index for index in special if index < vocab_size), vocab_size]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no text is forced, so none is encoded")
