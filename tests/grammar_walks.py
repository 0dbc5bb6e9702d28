"""Answers of a random model that follows grammars, for tests of grammars and schemas."""

import functools
import gc
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jsonschema_rs
import numpy as np
import tokenizers
from numpy.typing import NDArray
from random_schemas import random_schema
from tokenizers import decoders, models, pre_tokenizers, trainers

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
from sagellm.runtime.grammars.matcher import GrammarMatcher
from sagellm.runtime.models.pipelines import spelled_bytes
from sagellm.runtime.models.tokenizer import ByteTokenizer
from sagellm.runtime.sampling import Grammar


class WalkTokenizer(ByteTokenizer):
    """The parts of a folder's tokenizer that grammars use, around a tokenizer made here."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, is_byte_level: bool = True) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = is_byte_level
        self._added = tokenizer.get_added_tokens_decoder()
        self.vocab_size = tokenizer.get_vocab_size()
        self.special_token_ids = frozenset(
            index for index, added in self._added.items() if added.special
        )

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self.token(token_id).encode()
        return spelled_bytes(self.token(token_id), is_byte_level=self._is_byte_level)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


@functools.cache
def json_tokenizer(vocab_size: int = 1500) -> WalkTokenizer:
    """Byte-level BPE trained on JSON; the last ids are <|call|>, which is special, <tool>, which is
    not, and <|eos|>.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = (json.dumps(random_schema(rng), indent=rng.choice([None, 2])) for _ in range(200))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|call|>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens(["<|eos|>"])
    return WalkTokenizer(tokenizer)


@functools.cache
def json_compiler() -> GrammarCompiler:
    """Of a model with a few more logits than tokens, as models with padding have."""
    tokenizer = json_tokenizer()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 20, frozenset([eos_of(tokenizer)]))


def eos_of(tokenizer: WalkTokenizer) -> int:
    return tokenizer.vocab_size - 1


def allowed(matcher: GrammarMatcher, output: Sequence[int]) -> NDArray[np.intp]:
    """The tokens that may follow."""
    mask = np.full(-(-matcher.vocab_size // 32), -1, np.int32)
    gc.disable()  # a collection would visit the objects of all other tests, and counts as slow
    try:
        matcher.fill(output, mask)
    finally:
        gc.enable()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@dataclass
class RandomModel:
    """Random logits. The longer an answer is, the more likely are the tokens that end parts of it:
    those that begin with a closing bracket or a quote, and the end token.
    """

    tokenizer: WalkTokenizer
    rng: np.random.Generator
    patience: int = 20

    def __post_init__(self) -> None:
        spelled = [self.tokenizer.token_bytes(index) for index in range(self.tokenizer.vocab_size)]
        self._ends = np.array([token[:1] in (b'"', b"}", b"]") for token in spelled] + [False] * 64)
        self._ends[eos_of(self.tokenizer)] = True
        self._blank = np.array([token.isspace() for token in spelled] + [False] * 64)

    def answer(self, matcher: GrammarMatcher, max_tokens: int) -> tuple[list[int], bool]:
        """Sample at temperature 1. Returns the tokens, and whether the answer is finished."""
        output: list[int] = []
        for token in self.tokens(matcher, output):
            if token == eos_of(self.tokenizer):
                return output, True
            output.append(token)
            if len(output) == max_tokens:
                break
        return output, False

    def tokens(self, matcher: GrammarMatcher, output: list[int]) -> Iterator[int]:
        """The next token of `output`, again and again, until none may follow."""
        while (ids := allowed(matcher, output)).size:
            haste = max(0, len(output) - self.patience) / 4
            logits = self.rng.gumbel(size=ids.size) + self.rng.normal(size=ids.size)
            yield int(ids[np.argmax(logits + haste * self._ends[ids] - 3 * self._blank[ids])])


@dataclass
class Outcomes:
    """What became of random schemas. `refused`: how often for each reason."""

    num_finished: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def follow_random_schemas(seeds: Iterable[int], max_tokens: int = 400) -> Outcomes:
    """Answer by one random schema for each seed. Every finished answer is checked by another
    implementation of JSON Schema.
    """
    found, tokenizer = Outcomes(), json_tokenizer()
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        grammar = Grammar(kind="json_schema", text=json.dumps(schema))
        try:
            matcher = json_compiler().compile(grammar, "", ignores_eos=False)
        except GrammarError as error:
            found.refused[str(error).partition(" (at ")[0]] += 1
            continue
        model = RandomModel(tokenizer, np.random.default_rng(seed))
        output, is_finished = model.answer(matcher, max_tokens)
        found.num_tokens += len(output)
        found.num_cut += not is_finished
        if is_finished:
            found.num_finished += 1
            check_answer(schema, tokenizer.decode(output, skip_special_tokens=False))
    return found


def check_answer(schema: object, text: str) -> None:
    """Raise an error if the text is not valid JSON, or not valid by the schema."""
    validator_of(schema).validate(read_json(text))


def validator_of(schema: object) -> jsonschema_rs.Draft202012Validator:
    """Formats are given by their shape: leap seconds may be any, and the parts of an address of any
    length. Raises ValueError for a schema that is not valid.
    """
    return jsonschema_rs.Draft202012Validator(
        schema, validate_formats=True, formats=_SHAPES, ignore_unknown_formats=False
    )


def read_json(text: str) -> object:
    """The value of a text. Numbers that no float can hold become large ones."""
    return json.loads(text, parse_float=lambda digits: max(-1e300, min(float(digits), 1e300)))


def _has_shape(name: str) -> Callable[[str], bool]:
    validator = jsonschema_rs.Draft202012Validator({"format": name}, validate_formats=True)
    long_part = "^[^@]{60,}(?=@)|[^@.]{60,}" if name == "email" else "(?!)"
    return lambda text: validator.is_valid(re.sub(long_part, "x", text.replace(":60", ":59")))


_SHAPES = {name: _has_shape(name) for name in ("email", "time", "date-time")}
