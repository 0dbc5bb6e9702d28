"""Words that an answer must not hold, as sequences of token ids."""

from collections.abc import Iterable

from sagellm.runtime.models.tokenizer import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word at the beginning of a text; and of the word after a space, where that
    is as many tokens and another first one. As vLLM, so that equal requests ban equal tokens.
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
