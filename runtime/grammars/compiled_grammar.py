"""What llguidance reads and makes: the text of a grammar within limits, the vocabulary of a model,
and compiled grammars with what their matchers share.
"""

import json
import threading
from collections.abc import Iterable
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import check_regex_cost, regex_cost
from sagellm.runtime.grammars.json_schemas import read_schema, schema_text
from sagellm.runtime.grammars.lark_grammars import from_gbnf, has_gbnf_rules, lark_text
from sagellm.runtime.grammars.reasons import fault_place, reason
from sagellm.runtime.grammars.references import check_levels
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.sampling import Grammar

# Measured with 150,000 tokens: the masks of hostile grammars take up to 50 ms, but for ambiguous
# grammars (see below). Schemas with 500 optional properties, or enums of 10,000 texts, fit.
LIMITS = LLParserLimits(
    max_items_in_row=2500,  # an object takes 4 for each optional property
    step_max_items=50_000,
    max_lexer_states=50_000,  # about 30 MB
    max_grammar_size=20_000,
    initial_lexer_fuel=500_000,
    precompute_large_lexemes=False,  # seconds for some expressions, and no limit bounds it
    verbose_errors=False,
)
DEAD_END = "NoExtensionBias"  # how llguidance says that no token may follow
_MIN_FILLS = 500  # masks that a lexer must have served to be worth making anew
# A mask may take this CPU time on average. An ambiguous grammar passes every limit of llguidance,
# and each of its masks takes longer than the one before: 0.2 s when its answer ends here.
_MEAN_FILL_S, _SPARE_S = 0.005, 0.5
MAX_TEXT_BYTES = 256 << 10
# A forced text is not split as the tokenizer would split it: the model chooses. So a mask depends
# on the bytes of the output alone, and llguidance never calls the tokenizer.
_OPTIONS = '%llguidance {"no_forcing": true}'


class Source(NamedTuple):
    """The text that llguidance compiles. `has_lines`: its lines are those of the client's text.
    `schema`: the client's text, if it is a JSON schema.
    """

    text: str
    has_lines: bool = False
    schema: str = ""

    def fault(self, message: str) -> GrammarError:
        """The error for a message of llguidance, with the place of the fault if that is known."""
        cause = reason(message, has_lines=self.has_lines)
        return GrammarError(f"{cause}{fault_place(self.schema, cause)}" if self.schema else cause)


def llguidance_text(grammar: Grammar) -> Source:
    """The text that llguidance compiles. Raises GrammarError."""
    try:
        if len(grammar.text.encode()) <= MAX_TEXT_BYTES:
            return _TEXTS[grammar.kind](grammar.text)
    except UnicodeEncodeError:
        raise GrammarError("the grammar is not Unicode text") from None
    raise GrammarError(f"the grammar is longer than {MAX_TEXT_BYTES >> 10} KiB")


def _of_schema(text: str) -> Source:
    # The schema is a grammar of its own, because only a grammar in Lark has options.
    start = json.dumps({"name": "start", "lark_grammar": f"start: @schema\n{_OPTIONS}"})
    read = read_schema(text)
    check_levels(read)
    schema = schema_text(read)
    grammars = f'{{"grammars": [{start}, {{"name": "schema", "json_schema": {schema}}}]}}'
    return Source(grammars, schema=text)


def _of_regex(text: str) -> Source:
    check_regex_cost(regex_cost(text))
    found = json.loads(LLMatcher.grammar_from_regex(text))
    return Source(f"{found['grammars'][0]['lark_grammar']}\n{_OPTIONS}")


def _of_lark(text: str) -> Source:
    is_gbnf = has_gbnf_rules(text)
    lark = from_gbnf(text) if is_gbnf else text
    return Source(f"{lark_text(lark)}\n{_OPTIONS}", has_lines=not is_gbnf)


_TEXTS = {"json_schema": _of_schema, "regex": _of_regex, "lark": _of_lark}


class CompiledGrammar:
    """A grammar that is compiled for one vocabulary. Raises GrammarError.

    Its matchers share a lexer. The states of the lexer add up over all answers until their limit;
    then `renewed` makes another. Any thread may call any method.
    """

    def __init__(self, vocabulary: LLTokenizer, source: Source) -> None:
        self._vocabulary = vocabulary
        self._source = source
        self._lock = threading.Lock()
        self._start = self._compile()
        self._age = self._num_fills = 0
        self._slow_s = 0.0
        self.is_exhausted = False  # of no use for further answers: a limit was reached

    def copy(self) -> tuple[int, LLMatcher]:
        """A matcher that has consumed nothing, and the age of its lexer."""
        with self._lock:
            return self._age, self._start.deep_copy()

    def renewed(self, age: int, fault: str) -> tuple[int, LLMatcher]:
        """The same with another lexer than that of `age`, which failed with the message `fault`.
        Raises MatcherError if the grammar itself is the cause.
        """
        with self._lock:
            if age == self._age:
                if self._num_fills < _MIN_FILLS:
                    self.is_exhausted = True
                    raise MatcherError(reason(fault))
                self._renew()
            return self._age, self._start.deep_copy()

    def _renew(self) -> None:
        try:
            self._start = self._compile()
        except GrammarError as error:  # it was compiled before, so the machine is short of memory
            raise MatcherError(str(error)) from error
        self._age += 1
        self._num_fills = 0

    def account(self, cpu_s: float, num_tokens: int) -> None:
        """Count a mask that took `cpu_s` after `num_tokens` more tokens of an output. A resumed
        output has many. Raises MatcherError if masks take too long.
        """
        self._num_fills += 1
        self._slow_s = max(0.0, self._slow_s + cpu_s - _MEAN_FILL_S * max(1, num_tokens))
        if self._slow_s > _SPARE_S:
            self.is_exhausted = True
            raise MatcherError("the grammar takes too long to follow")

    def _compile(self) -> LLMatcher:
        start = LLMatcher(self._vocabulary, self._source.text, log_level=0, limits=LIMITS)
        # llguidance finds some faults, and some exceeded limits, only at the first two tokens.
        probe = start.deep_copy()
        if (token := _first_allowed(probe)) is not None:
            probe.try_consume_tokens([token])
            _first_allowed(probe)
        if probe.is_error() and (token is None or not probe.get_error().startswith(DEAD_END)):
            raise self._source.fault(probe.get_error())
        return start


def _first_allowed(matcher: LLMatcher) -> int | None:
    """The lowest token that may follow; None after an error."""
    mask = matcher.compute_bitmask()
    rest = mask.lstrip(b"\0")
    if matcher.is_error() or not rest:
        return None
    lowest = (rest[0] & -rest[0]).bit_length() - 1
    return 8 * (len(mask) - len(rest)) + lowest


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
