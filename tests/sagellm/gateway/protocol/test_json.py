"""Strict JSON: any bytes become a value or one 400, in linear time, without quoting the body."""

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol import json as strict
from sagellm.gateway.protocol.json import read_json

MIB = 1 << 20
SECRET = "the-prompt-nobody-may-see"


def value_or_none(body: bytes, max_depth: int) -> tuple[bool, Any]:
    """Whether the body was read, and its value; any failure but a 400 is raised."""
    try:
        return True, read_json(body, max_depth=max_depth)
    except ApiError as error:
        if error.status != 400:
            raise
        return False, None


def refusal(body: bytes, max_depth: int = 32) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_json(body, max_depth=max_depth)
    assert caught.value.status == 400
    assert len(caught.value.message) < 200
    return caught.value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "UTF-8"),
        ("{}".encode("utf-16-le"), "not valid JSON"),
        ("{}".encode("utf-32"), "UTF-8"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": "\xc0\x80"}', "UTF-8"),
        (b'{"a": "\\u0000"}', "NUL"),
        (b'{"a\\u0000": 1}', "NUL"),
        (b'{"a": "\x00"}', "invalid control character"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": ["\\udc00\\ud800"]}', "surrogate"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e400}', "64-bit"),
        (b'{"a": -1.5E999}', "64-bit"),
        (b'{"a": -0}', "-0"),
        (b'{"a": 12345678901234567890}', "19 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "19 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "key `a` twice"),
        (b'[{"x": {"a": 1, "a": 1}}]', "key `a` twice"),
        (b'{"a": 1, "\\u0061": 2}', "key `a` twice"),
        (b'{"a b": 1, "a b": 2}', "key of 3 characters twice"),
        (b"[" * 33 + b"]" * 33, "deeper than 32"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "deeper than 32"),
        (b"[" * 5000, "deeper than 32"),
        (b"[" * 5000 + b"x" + b"]" * 5000, "deeper than 32"),
        (b'[{"a":' * 5000, "deeper than 32"),
        (b"{", "left open"),
        (b"[}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": +1}', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": [1}', "a bracket is left open"),
        (b'{"a": 1}}', "one too many"),
        (b'{"a": "\n"}', "invalid control character"),
        (b'{"a": "\\x41"}', "invalid \\escape"),
        (b"{} {}", "extra data"),
        (b"// x\n{}", "not valid JSON"),
        (b"True", "not valid JSON"),
    ],
)
def test_what_is_not_strict_json_is_refused(body: bytes, says: str) -> None:
    assert says in refusal(body).message


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"{}", {}),
        (b" [1, -2, 0] ", [1, -2, 0]),
        (b'{"a": 9223372036854775807}', {"a": 2**63 - 1}),
        (b'{"a": 0.12345678901234567890123}', {"a": 0.12345678901234568}),
        (b'{"a": 123456789012345678901234.5}', {"a": 1.2345678901234568e23}),
        (b'{"a": 100000000000000000000e-2}', {"a": 1e18}),
        (b'{"a": "12345678901234567890 -0 [[[["}', {"a": "12345678901234567890 -0 [[[["}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a": "\\\\ud800 \\\\u0000"}', {"a": "\\ud800 \\u0000"}),
        (b'{"a": "\\\\\\"[[{{"}', {"a": '\\"[[{{'}),
        (b"[" * 32 + b"]" * 32, json.loads("[" * 32 + "]" * 32)),
        ('{"é\u2028": "\U0001f600"}'.encode(), {"é\u2028": "\U0001f600"}),
    ],
)
def test_strict_json_is_read(body: bytes, value: Any) -> None:
    assert read_json(body, max_depth=32) == value


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[16.0]", int), (b"[1e3]", int), (b"[1.5]", float), (b"[1e300]", float)]
)
def test_a_whole_number_is_an_integer(body: bytes, kind: type) -> None:
    """As JSON Schema has it; beyond 2**53 a float is no exact number."""
    assert type(read_json(body, max_depth=2)[0]) is kind


@pytest.mark.parametrize("body", [b'{"a": -0.0}', b'{"a": -0e3}'])
def test_a_negative_zero_loses_its_sign(body: bytes) -> None:
    assert math.copysign(1, read_json(body, max_depth=2)["a"]) == 1


@pytest.mark.parametrize(
    "body",
    [
        f'{{"p": "{SECRET}", "p": "{SECRET}"}}',
        f'{{"p": "{SECRET}"',
        f'{{"p": "{SECRET}" "{SECRET}"}}',
        f'{{"{SECRET} ": 1, "{SECRET} ": 2}}',
        f'{{"p": "{SECRET}\\ud800"}}',
        f'{{"p": "{SECRET}\n"}}',
        f'{{"p": "{SECRET}\\x"}}',
    ],
)
def test_a_refusal_holds_nothing_of_the_body(body: str) -> None:
    """Not in its message, and in no exception that it came from."""
    error: BaseException | None = refusal(body.encode())
    while error is not None:
        assert SECRET not in str(error)
        assert SECRET not in str(vars(error))
        assert not isinstance(error, ValueError)
        error = error.__context__


WORST = {
    "open brackets": b"[" * (8 * MIB),
    "pairs": b"[]" * (4 * MIB),
    "empty arrays": b"[" + b"[]," * (2 * MIB) + b"[]]",
    "quotes": b'"' * (8 * MIB),
    "backslashes": b'"' + b"\\" * (8 * MIB),
    "ones": b"[" + b"1," * (4 * MIB) + b"1]",
    "digits": b"1" * (8 * MIB),
    "fraction": b"0." + b"1" * (8 * MIB),
    "long integers": b"[" + (b"1" * 4000 + b",") * 2000 + b"1]",
    "floats": b"[" + b"1.5," * (2 * MIB) + b"1]",
    "exponents": b"[" + b"1e5," * (2 * MIB) + b"1]",
    "keys": b"{" + b",".join(b'"%d":1' % number for number in range(500_000)) + b"}",
    "objects": b"[" + b"{}," * 60_000 + b"{}]",
    "most values": b"[" + b"1," * (MIB - 1) + b"1]",
    "text": b'{"a":"' + b"x" * (8 * MIB) + b'"}',
    "newlines": b'{"a":"' + b"\\n" * (4 * MIB) + b'"}',
    "surrogates": b'{"a":"' + b"\\ud83d\\ude00" * (MIB // 2) + b'"}',
    "half surrogates": b'{"a":"' + b"\\ud83d" * MIB + b'"}',
    "space": b" " * (8 * MIB) + b"1",
}


@pytest.mark.parametrize("name", WORST)
def test_the_worst_bodies_do_not_hold_the_loop(name: str) -> None:
    """A recursion would die here, a quadratic scan take minutes; measured: 20 to 190 ms."""
    started = time.process_time()
    value_or_none(WORST[name], 32)
    assert time.process_time() - started < 2


@pytest.mark.alone
def test_an_ordinary_body_costs_little() -> None:
    """100 KiB of chat; measured: 1.2 ms."""
    message = {"role": "user", "content": 'lorem ipsum "dolor" sit amet\n' * 7}
    body = json.dumps({"messages": [message] * 400}).encode()
    assert len(body) > 100_000
    costs = []
    for _ in range(20):
        started = time.process_time()
        read_json(body, max_depth=32)
        costs.append(time.process_time() - started)
    assert min(costs) < 0.006


def test_the_limits_say_their_number() -> None:
    many = b"[" + b"[]," * (strict.MAX_BRACKETS // 2) + b"[]]"
    assert "65536 objects and arrays" in refusal(many).message
    commas = b"[" + b"1," * (strict.MOST[","] + 1) + b"1]"
    assert "1048576" in refusal(commas).message


NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
TEXT = st.text(CHARACTERS, max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_400(body: bytes) -> None:
    is_read, value = value_or_none(body, 8)
    assert not is_read or json.loads(body) == value


@given(st.lists(st.sampled_from([*'[]{}":,\\-+.eE0123456789truefalsn ', "\\u", "ud800"])))
def test_any_almost_json_is_a_value_or_a_400(tokens: list[str]) -> None:
    body = "".join(tokens).encode()
    is_read, value = value_or_none(body, 8)
    assert not is_read or json.loads(body) == value


@given(VALUES, st.booleans())
def test_whatever_was_written_is_read(value: Any, is_ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    assert read_json(body, max_depth=64) == value


@given(VALUES, st.data())
def test_a_mutilated_body_is_a_value_or_a_400(value: Any, data: st.DataObject) -> None:
    body = bytearray(json.dumps(value).encode())
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    is_read, again = value_or_none(bytes(body), 64)
    assert not is_read or json.loads(body) == again
