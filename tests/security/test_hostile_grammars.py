"""S16: schemas, expressions and grammars that stall or end other systems, before a real engine.

Each is refused or answered in half a second, while the loop goes on and nothing is fetched.
"""

from typing import Any

import pytest
import trio
from gateway_served import Reply, post, read_reply
from gateway_session import ServedSession, late_wakes, served_session

ANSWER_S = 0.5
LAG_S = 0.05
TRIES = 5  # the fastest counts: others use this machine, too


def _deep(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _any_of(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


def _doubling(depth: int) -> Any:
    """Definitions of which each names the one before twice: 2 ** depth paths."""
    known: Any = {"d0": {"type": "integer"}}
    for level in range(depth):
        before = {"$ref": f"#/$defs/d{level}"}
        known[f"d{level + 1}"] = {"anyOf": [before, {"type": "array", "items": before}]}
    return {"$defs": known, "$ref": f"#/$defs/d{depth}"}


SCHEMAS: dict[str, Any] = {
    "no type": {"type": "nothing"},
    "a loop": {"$ref": "#"},
    "a loop of two": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                      "$ref": "#/$defs/a"},
    "a tree": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "a file": {"$ref": "file:///etc/passwd"},
    "deep": _deep(14),
    "too deep": _deep(200),
    "a large enum": {"enum": [f"value {number}" for number in range(10**5)]},
    "anyOf^10": _any_of(10),
    "2^20 paths": _doubling(20),
    "many properties": {"properties": {f"p{number}": {} for number in range(3000)}},
    "a long string": {"type": "string", "minLength": 10**6},
    "a longer string": {"type": "string", "maxLength": 10**18},
    "a long array": {"type": "array", "items": {"enum": ["a"]}, "minItems": 10**6},
    "a pattern": {"type": "string", "pattern": "(a+)+b"},
    "a broken pattern": {"type": "string", "pattern": "(("},
    "lookbehind": {"type": "string", "pattern": "(?<=a)b"},
    "a large pattern": {"type": "string", "pattern": "a{1,1000}{1,1000}"},
    "a large integer": {"type": "integer", "minimum": 10**18},
    "a multiple": {"type": "integer", "multipleOf": 9999991},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"not": {}}},
}  # fmt: skip
REGEXES = (
    *("(a+)+b", "a{1,1000}{1,1000}", "(?<=a)b", "(?=a)b", r"(a)\1", "((", "[" * 500, ".*" * 500),
    *("(x+x+)+y", "(.{0,300}){0,300}", r"\p{L}{1,1000}", "a" * 10**5),
)
GRAMMARS = (
    "root ::= root",
    'root ::= root "a" | "a"',
    'a ::= b\nb ::= a\nroot ::= a "x"',
    "start: start",
    'start: start "a" | "a"',
    "start: a\na: b\nb: a",
    "start: A\nA: A",
    'start: "a"{1,1000000}',
    "start: " + "(" * 2000 + '"a"' + ")" * 2000,
    'start: %json {"$ref": "#"}',
    'start: %lark { start: "a" }' * 50,
    "root ::= " + "(" * 2000 + '"a"' + ")" * 2000,
    "%import common.WORD\nstart: WORD",
    "start: /(?<=a)b/",
)
CASES: dict[str, Any] = {
    **{name: {"guided_json": schema} for name, schema in SCHEMAS.items()},
    **{f"regex {regex[:20]}": {"guided_regex": regex} for regex in REGEXES},
    **{f"grammar {text[:20]!r}": {"guided_grammar": text} for text in GRAMMARS},
    "a long choice": {"guided_choice": ["a" * 100] * 10**4},
    "many choices": {"guided_choice": [f"{number}" for number in range(20_000)]},
}


async def ask(served: ServedSession, body: Any) -> tuple[Reply, float]:
    """The answer, and the seconds that it took."""
    began_s = trio.current_time()
    async with await served.connect() as stream:
        await stream.send_all(post("/v1/completions", body, "Connection: close"))
        reply = await read_reply(stream)
    return reply, trio.current_time() - began_s


async def faults(served: ServedSession, fields: Any) -> list[str]:
    """What is wrong with the answers to one case."""
    body = {"prompt": "x", "max_tokens": 2, **fields}
    seconds, lags = [], []
    for _ in range(TRIES):
        async with late_wakes() as lates:
            reply, taken_s = await ask(served, body)
        seconds.append(taken_s)
        lags.append(max(lates, default=0.0))
    canary, _ = await ask(served, {"prompt": "x", "max_tokens": 2})
    print(reply.status, f"{min(seconds):.3f} s, lag {min(lags):.3f} s", reply.body[:150])
    found = {
        "status": reply.status not in (200, 400),
        "form": reply.status == 400 and set(reply.error) != {"message", "type", "param", "code"},
        "time": min(seconds) > ANSWER_S,
        "lag": min(lags) > LAG_S,
        "canary": canary.status != 200,
    }
    return [name for name, is_wrong in found.items() if is_wrong]


@pytest.mark.alone
async def test_what_is_hostile_is_refused_or_answered_in_time() -> None:
    async with served_session("hypercorn", "joint", {}) as served:
        await ask(served, {"prompt": "x", "guided_regex": "a"})  # what is made once is made now
        wrong = {}
        for name, fields in CASES.items():
            print(name, end=": ")
            if found := await faults(served, fields):
                wrong[name] = found
    assert wrong == {}


async def test_a_reference_is_not_followed() -> None:
    """To a server of the schema's own, which would see it."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    seen = []

    async def accept() -> None:
        async with await listener.accept():
            seen.append(port)

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        async with served_session("hypercorn", "joint", {}) as served:
            for place in (f"http://127.0.0.1:{port}/s.json", f"http://127.0.0.1:{port}/#/a"):
                reply, _ = await ask(served, {"prompt": "x", "guided_json": {"$ref": place}})
                assert reply.status == 400
                assert reply.error["code"] == "invalid_grammar"
                assert str(port) not in reply.error["message"]
        nursery.cancel_scope.cancel()
    assert seen == []
