"""Bad words become the same token sequences as in vLLM."""

import pytest

from sagellm import Graph, Sampling
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import ByteTokenizer, bad_words_token_ids, load_tokenizer


class Spaced(ByteTokenizer):
    """A word after a space is one other token."""

    def encode(self, text, *, add_special_tokens=True):
        return (7,) if text == " hey" else (5,) if text == "hey" else tuple(text.encode())


@pytest.mark.parametrize("word", ["hey", " hey", "  hey"])
def test_a_word_is_banned_with_and_without_its_space(word):
    assert bad_words_token_ids(Spaced(), [word]) == ((5,), (7,))


def test_a_space_that_is_one_more_token_bans_nothing_more():
    assert bad_words_token_ids(ByteTokenizer(), ["ab"]) == ((97, 98),)


def test_blanks_are_words():
    assert bad_words_token_ids(ByteTokenizer(), ["\n"]) == ((10,),)


async def test_an_answer_goes_without_them():
    messages = [{"role": "user", "content": "What is 23 + 45?"}]
    tokenizer = load_tokenizer(resolve_model("sage-tiny"))
    async with Graph.load("joint").open() as session:
        plain = await session.generate(messages, sampling=Sampling(max_tokens=8))
        banned = Sampling(max_tokens=8, bad_words=("6", "68"))
        other = await session.generate(messages, sampling=banned)
    assert plain.text.startswith("6")
    assert "6" not in other.text
    assert bad_words_token_ids(tokenizer, ["6"])
