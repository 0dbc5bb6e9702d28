"""Texts that are small to send and large to read are refused at once."""

import time
from collections.abc import Callable

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.codec import from_json, from_msgpack
from sagellm.graphs.text.tree import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES
from sagellm.graphs.text.yaml import load


def laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (laughs(), f"more than {MAX_VALUES} values"),
        ("[" * 50_000, f"deeper than {MAX_DEPTH}"),
        ("{a: " * 10_000, f"deeper than {MAX_DEPTH}"),
        ("- " * 10_000, f"deeper than {MAX_DEPTH}"),
        ("a: &a [*a]", "anchored as `&a`"),
        ("x" * (MAX_CHARACTERS + 1), f"more than {MAX_CHARACTERS} characters"),
        ("a: " + "9" * 50_000, "64 bits"),
    ],
)
def test_a_bomb_is_refused_quickly(text: str, word: str) -> None:
    start = time.monotonic()
    with pytest.raises(GraphError, match=word):
        load(text, file="bomb.yaml")
    assert time.monotonic() - start < 10  # unbounded, each would take minutes or all memory


def test_as_many_values_as_fit_are_read() -> None:
    rows = "\n".join(f"  a{n}: {{op: map}}" for n in range(1000))
    text = f"sagellm: 1\nname: wide\noperators:\n{rows}\nedges: []\n"
    assert len(load(text, file="wide.yaml").graph.nodes) == 1000


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (from_json, b'{"name":"x","dialect":"s","attrs":{"a":' + b"[" * 100_000),
        (from_json, b'{"nodes":[{"body":' * 100_000),
        (from_msgpack, b"\x81\xa5attrs\x81\xa1a" + b"\x91" * 100_000),
    ],
)
def test_a_nested_encoding_is_refused(read: Callable[[bytes], object], content: bytes) -> None:
    with pytest.raises(GraphError, match="not a graph"):
        read(content)
