"""Words that an answer must not hold, as sequences of token ids."""

from collections.abc import Iterable

from sagellm.runtime.models.tokenizer import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word at the beginning of a text; and of the word after a space, where that
    is as many tokens and another first one. As vLLM, so that equal requests ban equal tokens.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        bare = word.lstrip() or word
        plain, spaced = (
            tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")
        )
        found.append(plain)
        if plain[:1] != spaced[:1] and len(plain) == len(spaced):
            found.append(spaced)
    return tuple(token_ids for token_ids in found if token_ids)
