"""Decides which templates and tokenizers may run in this process, as they cannot multiply a text.

All others run in a helper process. Decoders are an exception: they run in the engine for each
token, so a folder is refused if its decoder could multiply texts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel, WordPiece

from sagellm.runtime.models import ModelError
from sagellm.runtime.models.pipelines import SPLITS

Component: TypeAlias = Mapping[str, Any]  # as tokenizer.json has it: "type", and options

MAX_TOKEN_CHARS = 4096  # published vocabularies have runs of some hundred spaces
_MAX_GROWTH = 64  # characters that a normalizer may make of one character
_MAX_PARTS = 16  # components of a sequence
_MAX_ADDED = 64  # special tokens around a text
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_MAX_AFFIX_CHARS = 16  # each character of a text is looked up with its affixes
_MAX_WORD_CHARS = 200  # WordPiece takes time quadratic in the length of a word; 100 is usual

# blake2b-128 of the text of known templates, which write each message once.
TEMPLATES = frozenset(
    {
        "e30cbd7b5cd2aec690e57c4b4375c160",  # sage-tiny
        "fa178aa9246d7297e2fc92fcf9661350",  # ChatML, the bare form
    }
)


def is_known_template(text: str) -> bool:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest() in TEMPLATES


def encodes_harmlessly(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's time and tokens are proportional to the length of a text."""
    return (
        _growth(_state(tokenizer.normalizer)) <= _MAX_GROWTH
        and all(_cuts_plainly(part) for part in _components(_state(tokenizer.pre_tokenizer)))
        and all(_adds_little(part) for part in _components(_state(tokenizer.post_processor)))
        and _is_plain_model(tokenizer.model)
    )


def check_decoder(name: str, tokenizer: Tokenizer) -> None:
    """Raise ModelError if a few tokens could decode to a text of unbounded length."""
    growth = 1.0
    for part in _components(_state(tokenizer.decoder)):
        growth *= _DECODERS.get(part["type"], _unbounded)(part)
    if growth > _MAX_GROWTH:
        cause = f"model {name}: the decoder of tokenizer.json may multiply texts without bound"
        raise ModelError(cause, "see that it is the one that the model was published with")


_Vocabulary: TypeAlias = dict[str, int] | list[tuple[str, float]]


class _Model(msgspec.Struct):
    vocab: msgspec.Raw = msgspec.Raw(b"{}")  # a `_Vocabulary`, which takes long to decode


class _Added(msgspec.Struct):
    content: str = ""


class TokenizerParts(msgspec.Struct):
    """The parts of tokenizer.json that are checked before the tokenizers library reads it."""

    model: _Model
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: Any = None
    decoder: Any = None

    @property
    def loads_harmlessly(self) -> bool:
        """Whether this process may load the file. Loading normalizes added tokens, and compiles
        regular expressions; even a short regular expression may take gigabytes.
        """
        if not SPLITS.issuperset(_regexes([self.normalizer, self.pre_tokenizer, self.decoder])):
            return False
        try:
            return _growth(self.normalizer) <= _MAX_GROWTH
        except (KeyError, TypeError, AttributeError):
            return False


def _regexes(part: object) -> Iterator[str]:
    """All regular expressions in a component."""
    if isinstance(part, dict):
        if isinstance(regex := part.get("Regex"), str):
            yield regex
        for inner in part.values():
            yield from _regexes(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _regexes(inner)


def read_parts(name: str, path: Path) -> TokenizerParts:
    """Read the parts of a tokenizer.json. Raises ModelError if the file cannot be read, or if a
    token is longer than `MAX_TOKEN_CHARS`: a few long tokens could exhaust memory.
    """
    try:
        parts = msgspec.json.decode(path.read_bytes(), type=TokenizerParts)
        tokens = _long_tokens(bytes(parts.model.vocab))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"model {name}: {path} cannot be read: {error}") from error
    longest = max(map(len, [*tokens, *(added.content for added in parts.added_tokens)]), default=0)
    if longest > MAX_TOKEN_CHARS:
        cause = f"model {name}: {path} has a token of {longest} characters"
        raise ModelError(cause, f"at most {MAX_TOKEN_CHARS} are read; download it again")
    return parts


def _long_tokens(vocab: bytes) -> list[str]:
    """The tokens of a vocabulary in JSON; an empty list if all tokens are surely short.

    Raises msgspec.MsgspecError for a vocabulary that has to be decoded and is none.
    """
    # No text between two quotes is shorter than its token. A quote that ends a token after a
    # backslash is replaced too, which only makes the text longer.
    texts = vocab.replace(rb"\"", b"..").split(b'"')
    if max(map(len, texts)) <= MAX_TOKEN_CHARS:
        return []
    found = msgspec.json.decode(vocab, type=_Vocabulary)
    return list(found) if isinstance(found, dict) else [text for text, _ in found]


def _state(component: Any) -> Component | None:
    """A component as the library serialises it; {"type": ""} if it cannot."""
    if component is None:
        return None
    try:
        found: Component = json.loads(component.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return {"type": ""}
    return found


def _components(part: Component | None) -> Iterator[Component]:
    """The components of a sequence, also of nested sequences; otherwise the component itself."""
    if part is None:
        return
    inner = next((part[key] for key in _INNER if isinstance(part.get(key), list)), None)
    if part["type"] != "Sequence" or inner is None or len(inner) > _MAX_PARTS:
        yield part
        return
    for one in inner:
        yield from _components(one)


_INNER = ("normalizers", "pretokenizers", "processors", "decoders")


def _growth(normalizer: Component | None) -> float:
    """The most characters that a normalizer may make of one character."""
    growth = 1.0
    for part in _components(normalizer):
        growth *= _NORMALIZERS.get(part["type"], _unbounded)(part)
    return growth


def _unbounded(part: Component) -> float:
    return float("inf")


def _same(part: Component) -> float:
    return 1.0


def _replaced(part: Component) -> float:
    """The growth of a replacement. It is unbounded for a regular expression, which may match the
    empty text everywhere.
    """
    pattern = part.get("pattern", {}).get("String")
    return max(1.0, len(part["content"]) / len(pattern)) if pattern else float("inf")


def _prepended(part: Component) -> float:
    return 1.0 + len(part["prepend"])


def _stripped(part: Component) -> float:
    """The growth of a strip: unbounded, and so refused, if it strips the end. The library panics if
    the text is shorter than the strip.
    """
    return 1.0 if part["stop"] == 0 else float("inf")


# The characters that a normalizer may make of one character, in the worst case of Unicode.
_NORMALIZERS: dict[str, Callable[[Component], float]] = {
    **dict.fromkeys(("NFC", "NFD", "Lowercase", "BertNormalizer"), lambda part: 4.0),
    **dict.fromkeys(("NFKC", "NFKD"), lambda part: 18.0),
    **dict.fromkeys(("Strip", "StripAccents", "Nmt"), _same),
    "ByteLevel": lambda part: 4.0,
    "Replace": _replaced,
    "Prepend": _prepended,
}
_DECODERS: dict[str, Callable[[Component], float]] = {
    **dict.fromkeys(("ByteLevel", "ByteFallback", "Fuse", "Metaspace"), _same),
    **dict.fromkeys(("WordPiece", "BPEDecoder", "CTC"), lambda part: 2.0),
    "Strip": _stripped,
    "Replace": _replaced,
}
_PLAIN_CUTS = frozenset(
    {
        *("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Metaspace", "Digits"),
        *("Punctuation", "CharDelimiterSplit", "UnicodeScripts"),
    }
)


def _cuts_plainly(part: Component) -> bool:
    if part["type"] != "Split":
        return part["type"] in _PLAIN_CUTS
    return "String" in part["pattern"] or part["pattern"].get("Regex") in SPLITS


def _adds_little(part: Component) -> bool:
    match part["type"]:
        case "ByteLevel" | "BertProcessing" | "RobertaProcessing":
            return True
        case "TemplateProcessing":
            pieces = part["single"]
            num_texts = sum("Sequence" in piece for piece in pieces)
            ids = [len(token["ids"]) for token in part["special_tokens"].values()]
            return num_texts == 1 and max(ids, default=0) * len(pieces) <= _MAX_ADDED
    return False


def _is_plain_model(model: Any) -> bool:
    """Whether the model takes time linear in the text. Unigram does not: its time also grows with
    the length of its tokens.
    """
    affixes = [getattr(model, name, None) or "" for name in _AFFIXES]
    if isinstance(model, WordPiece) and model.max_input_chars_per_word > _MAX_WORD_CHARS:
        return False
    is_short = max(map(len, affixes)) <= _MAX_AFFIX_CHARS
    return is_short and isinstance(model, BPE | WordLevel | WordPiece)
