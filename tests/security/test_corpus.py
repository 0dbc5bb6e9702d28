"""Byte-exact requests over sockets: each gets its expected answer, and serving goes on.

A file of `corpus/` says why it exists and which status is expected; the bytes follow the first
empty line. ${x*N} in them stands for N times x. Files are named by a row of the security
requirements, or by an advisory on another serving system.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_served import KEYS, SERVERS, Reply, ask, null_gateway, post

CORPUS = sorted(Path(__file__).with_name("corpus").glob("*.http"))
KEY = "Authorization: Bearer user-key"
CANARY = post("/v1/completions", {"prompt": "x", "max_tokens": 2}, KEY)
_HERE = re.escape(str(Path(__file__).parents[2]).encode())
_LEAKS = re.compile(rb"Traceback|/usr/|site-packages|0x[0-9a-f]{6,}|\.py\b|" + _HERE)


@pytest.fixture(scope="module", params=SERVERS)
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    with null_gateway(request.param, **KEYS) as port:
        yield port


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_answer_is_right_and_the_next_request_is_served(port: int, path: Path) -> None:
    head, _, raw = path.read_bytes().partition(b"\n\n")
    expected = re.search(r"expect: (\S+)", head.decode())
    assert expected
    reply = ask(port, _expanded(raw))
    assert str(reply.status) in expected[1].split("|")
    _check_shape(reply)
    canary = ask(port, CANARY)
    assert (canary.status, canary.is_whole) == (200, True)


def _expanded(raw: bytes) -> bytes:
    return re.sub(rb"\$\{(.)\*(\d+)\}", lambda match: match[1] * int(match[2]), raw)


def _check_shape(reply: Reply) -> None:
    """An error is one JSON object of a fixed shape, without details of the machine."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", reply.headers["x-request-id"])
    assert not any(name.startswith("access-control-") for name in reply.headers)
    assert not _LEAKS.search(reply.body)
    if reply.status >= 400:
        assert set(reply.error) == {"message", "type", "param", "code"}
