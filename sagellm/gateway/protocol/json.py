"""A strict JSON parser for request bodies, in linear time, and a filter of their fields."""

import json
import math
import re
from collections import Counter
from typing import Any

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.other_apis import Foreign, check_ignored, refuse_unbuilt
from sagellm.graphs.vocabulary import nearest

_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def shown(name: str) -> str:
    """Return a field's name for a message: the name if it is a plain word, else its length."""
    return f"`{name}`" if _PLAIN.fullmatch(name) else f"of {len(name)} characters"


# Limits on the time that a body blocks the loop: the parser and checks do work for each of these.
MAX_BRACKETS = 1 << 17
MOST = {",": 1 << 20, ":": 1 << 17, ".": 1 << 16, "e": 1 << 16, "E": 1 << 16}
MAX_QUOTES = 1 << 19
_EXACT = 1 << 53  # floats represent every integer up to this one exactly
_INT_DIGITS = 19  # digits of the largest 64-bit integer

# Maps all brackets to [] and all digits to 0, so that one search finds deep nesting or long runs.
_OUTLINE = bytes.maketrans(b"{}123456789", b"[]000000000")
_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]")
_LONG_RUN = b"0" * (_INT_DIGITS + 1)
_LONG_INT = re.compile(rb"(?<![0-9.eE+])-?[0-9]{%d,}(?![0-9.eE])" % (_INT_DIGITS + 1))
_MINUS_ZERO = re.compile(rb"-0(?![0-9.eE])")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(body: bytes, *, max_depth: int) -> Any:
    """Return the JSON value of a body.

    The body must be UTF-8, with each key once in an object, numbers of 64 bits, no NUL and no lone
    surrogates. Raises ApiError (400), whose message contains nothing of the body except the name
    of a key.
    """
    text = _decode(body)
    escapes = body.replace(rb"\\", b"")  # each remaining backslash begins an escape
    if rb"\u0000" in escapes:
        raise ApiError(400, "the body has a NUL in a string; leave it out")
    outside = _outside_strings(escapes)
    outline = outside.translate(_OUTLINE)
    _check_integers(outside, outline)
    _check_outline(outline, max_depth)
    value = _parse(text)
    if _SURROGATE.search(escapes):
        _check_unicode(value)
    return value


def _decode(body: bytes) -> str:
    if not body.strip():
        raise ApiError(400, "the body is empty; send a JSON object")
    if body.startswith(b"\xef\xbb\xbf"):
        raise ApiError(400, "the body starts with a byte order mark; send UTF-8 without one")
    try:
        return body.decode()
    except UnicodeDecodeError:
        fault = "the body is not UTF-8"
    raise ApiError(400, fault)  # outside `except`: else the error's context would hold the body


def _outside_strings(escapes: bytes) -> bytes:
    """Return the bytes of a body outside its strings. Correct up to the first syntax error.

    `escapes`: the body without double backslashes.
    """
    plain = escapes.replace(rb"\"", b"")
    if plain.count(b'"') > MAX_QUOTES:
        raise ApiError(400, f"the body has more than {MAX_QUOTES // 2} strings")
    return b"".join(plain.split(b'"')[::2])


def _check_integers(outside: bytes, outline: bytes) -> None:
    if _MINUS_ZERO.search(outside):
        raise ApiError(400, "the body has the integer -0; write 0")
    if _LONG_RUN in outline and _LONG_INT.search(outside):
        raise ApiError(400, f"the body has an integer of more than {_INT_DIGITS} digits")


def _check_outline(outline: bytes, max_depth: int) -> None:
    """Raise ApiError for too many marks or brackets, too deep nesting, or unmatched brackets."""
    for mark, most in MOST.items():
        if outline.count(mark.encode()) > most:
            raise ApiError(400, f"the body has more than {most} times `{mark}` outside strings")
    brackets = outline.translate(None, _BUT_BRACKETS)
    if len(brackets) > MAX_BRACKETS:
        limit = MAX_BRACKETS // 2
        raise ApiError(400, f"the body has more than {limit} objects and arrays")
    for _ in range(max_depth):  # each iteration removes the innermost level
        brackets = brackets.replace(b"[]", b"")
    num_open = brackets.count(b"[")
    if num_open != brackets.count(b"]") and num_open <= max_depth:
        raise ApiError(
            400, "the body is not valid JSON: a bracket is left open, or is one too many"
        )
    if brackets:
        deep = f"the body is nested deeper than {max_depth} levels, or its brackets do not match"
        raise ApiError(400, deep)


def _parse(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        fault = f"the body is not valid JSON: {_reason(error)} at character {error.pos}"
    except (ValueError, RecursionError):
        fault = "the body is not valid JSON"
    raise ApiError(400, fault)


def _reason(error: json.JSONDecodeError) -> str:
    """Return the parser's message without its quotation of the body."""
    return error.msg.partition(":")[0].removesuffix(" at").lower()


def _check_unicode(value: Any) -> None:
    """Raise ApiError for a string with half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return
    except UnicodeEncodeError:
        fault = "the body has a lone surrogate in a string; it is no character"
    raise ApiError(400, fault)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raises ApiError for a key that occurs twice."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
    raise ApiError(400, f"the body has the key {shown(twice)} twice in one object")


def _constant(_: str) -> float:
    raise ApiError(400, "the body has NaN or Infinity, which are no JSON")


def _float(text: str) -> float | int:
    value = float(text)
    if math.isinf(value):
        raise ApiError(400, "the body has a number beyond the range of 64-bit floats")
    # In JSON Schema, and for many clients, 16.0 is an integer. This also turns -0.0 into 0.
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, strict=True
)


_GUESSED_LEN = 64  # no correction of longer names: they are no typos, and comparing takes long


def fields_of(
    value: Any, known: tuple[str, ...], foreign: Foreign, where: str = ""
) -> dict[str, Any]:
    """Return the known fields of an object that are not null.

    `where` is the object's place in the body, such as "messages[0]"; "" is the body itself. Raises
    ApiError (400) for the first unknown or unsupported field.
    """
    if not isinstance(value, dict):
        raise wrong(where, "must be an object") if where else _no_object()
    return {
        name: said
        for name, said in value.items()
        if _is_said(name, said, known, foreign, f"{where}." if where else "")
    }


def _is_said(name: str, said: Any, known: tuple[str, ...], foreign: Foreign, prefix: str) -> bool:
    """Whether a field is known and not null. Raises ApiError (400) if it is not allowed."""
    if said is None or name in known:
        return said is not None
    if name in foreign.taken:
        check_ignored(prefix + name, said, foreign.taken[name])
    elif name in foreign.unbuilt:
        cure = foreign.cures.get(name)
        refuse_unbuilt(prefix + name, said, foreign.unbuilt[name], cure=cure)
    else:
        raise _unknown(name, known, foreign, prefix)
    return False


def _no_object() -> ApiError:
    return ApiError(400, "the body is no JSON object; send {...}")


def _unknown(name: str, known: tuple[str, ...], foreign: Foreign, prefix: str) -> ApiError:
    cure = foreign.cures.get(name)
    close = nearest(name, known) if cure is None and len(name) <= _GUESSED_LEN else None
    hint = f"; did you mean `{prefix}{close}`?" if close else f"; {cure}" if cure else ""
    plain = shown(name)
    message = f"unknown field {plain}{f' in {prefix[:-1]}' if prefix else ''}{hint}"
    param = prefix + name if plain == f"`{name}`" else prefix[:-1] or None
    return ApiError(400, message, param=param, code="unknown_parameter")
