"""Grammars that would take long, or gigabytes, without limits."""

import json
from typing import Any

from sagellm.runtime.sampling import Grammar


def schema(value: Any) -> Grammar:
    return Grammar(kind="json_schema", text=value if isinstance(value, str) else json.dumps(value))


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def lark(text: str) -> Grammar:
    return Grammar(kind="lark", text=text)


def nested(depth: int) -> Grammar:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"]}
    return schema(value)


def doubled(depth: int, **keywords: object) -> Grammar:
    """Every level refers to the next one twice."""
    levels = {
        f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)
    }
    return schema({"$ref": "#/$defs/d0", "$defs": {**levels, f"d{depth}": keywords}})


def properties(number: int, **keywords: object) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{one}": keywords for one in range(number)}}


LETTERS = "abcdefghijklmnop"
NUMBERS = range(300)
# Refused, each with a part of the reason.
REFUSED: dict[str, tuple[Grammar, str]] = {
    "type": (schema({"type": "foo"}), "a type that JSON does not have"),
    "wrong value": (schema({"required": "a"}), "a value of a wrong type: required"),
    "no object": (schema("[]"), "not a JSON object"),
    "no json": (schema("{"), "not valid JSON"),
    "long integer": (schema('{"minimum":%s}' % ("9" * 5000)), "not valid JSON"),
    "surrogate": (schema('{"const":"\\ud800"}'), "not Unicode text"),
    "raw surrogate": (regex("\ud800"), "not Unicode text"),
    "reference loop": (schema({"$ref": "#"}), "no text"),
    "two references": (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"},
                                               "b": {"$ref": "#/$defs/a"}}}), "no text",
    ),
    "loop of allOf": (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}}),
        "no text",
    ),
    "remote reference": (schema({"$ref": "http://127.0.0.1:9/x"}), "only references into"),
    "remote base": (schema({"$id": "http://127.0.0.1:9/", "$ref": "x"}), "only references into"),
    "file": (schema({"$ref": "file:///etc/passwd"}), "only references into"),
    "no target": (schema({"$ref": "#/$defs/x"}), "nothing at its target"),
    "depth 200": (nested(200), "nested too deeply"),
    "depth 5000": (schema('{"items":' * 5000 + "{}" + "}" * 5000), "nested too deeply"),
    "deep value": (schema('{"const":' + "[" * 4000 + "]" * 4000 + "}"), "nested too deeply"),
    "large enum": (schema({"enum": [f"value {one}" for one in range(10**5)]}), "256 KiB"),
    "product": (
        schema({"allOf": [{"anyOf": [{"properties": {f"p{one}": {"const": two}},
                                      "type": "object"} for two in range(4)]}
                          for one in range(12)]}), "too large",
    ),
    "anyOf of optional": (
        schema({"anyOf": [properties(150, type="string") for _ in range(20)]}), "too",
    ),
    "properties": (schema(properties(1001, type="string")), "more than 1000"),
    "optional properties": (schema(properties(900, type="string")), "too many alternatives"),
    "multipleOf": (schema({"type": "integer", "multipleOf": 999_983}), "multipleOf"),
    "multipleOf of two": (
        schema({"allOf": [{"type": "integer", "multipleOf": one} for one in (997, 991)]}),
        "multipleOf",
    ),
    "multipleOf behind a reference": (
        schema({"$ref": "#/x/0", "x": [{"type": "integer", "multipleOf": 999_983}]}), "multipleOf",
    ),
    "pattern behind a reference": (
        schema({"$ref": "#/const", "const": {"type": "string", "pattern": "a?" * 2000}}),
        "in a row",
    ),
    "multipleOf 0": (schema({"type": "integer", "multipleOf": 0}), "not above 0"),
    "huge minimum": (schema({"type": "number", "minimum": 1e308}), "minimum and maximum"),
    "patterns together": (
        schema({"allOf": [{"type": "string", "pattern": f"^.*{one}.*$"} for one in LETTERS]}),
        "must hold together",
    ),
    "patternProperties": (
        schema({"type": "object", "patternProperties": {"a.{20}": {}, "b.{20}": {}}}),
        "patternProperties",
    ),
    "format": (schema({"type": "string", "format": "uri-template"}), "a format"),
    "keywords": (schema({"not": {}, "if": {}}), "not supported: if, not"),
    "overlapping oneOf": (
        schema({"oneOf": [{"type": "string"}, {"minLength": 3, "type": "string"}]}), "oneOf",
    ),
    "look-behind": (regex("(?<=a)b"), "look-ahead or look-behind"),
    "back-reference": (regex(r"(a)\1"), "back-reference"),
    "word boundary": (regex(r"a\bb"), "word boundary"),
    "no regex": (regex("("), "not valid"),
    "nested groups": (regex("(" * 5000 + "a" + ")" * 5000), "nested too deeply"),
    "optional parts": (regex(".?" * 4000), "in a row"),
    "optional groups": (regex("(ab)?" * 1100 + "|x"), "in a row"),
    "pattern": (schema({"type": "string", "pattern": "a?" * 2000}), "in a row"),
    "enum beside a pattern": (
        schema({"enum": [f"{one:x}" for one in range(15_000)], "pattern": "^.*a.*$"}), "too long",
    ),
    "arrays in enum": (schema({"enum": [[one] for one in range(8000)]}), "too long"),
    "bounds of numbers": (
        schema({"anyOf": [{"type": "number", "minimum": one + 1 / 3, "maximum": 10**9 + one / 7}
                          for one in range(2000)]}), "too long",
    ),
    "uris": (schema(properties(1000, type="string", format="uri")), "too long"),
    "many patternProperties": (
        schema({"type": "object", "patternProperties": {f"^p{one}x$": {} for one in range(1000)}}),
        "may have 100",
    ),
    "many patterns": (
        schema({"anyOf": [{"type": "string", "pattern": "a?" * 300} for _ in range(20)]}),
        "in a row",
    ),
    "composed terminal": (
        lark("start: A\nA: " + "B " * 60 + "\nB: " + "C? " * 60 + "\nC: /./"), "in a row",
    ),
    "doubling terminal": (
        lark("start: A0\n" + "".join(f"A{one}: A{one + 1} A{one + 1}\n" for one in range(40))
             + 'A40: "a"?'), "in a row",
    ),
    "hidden multipleOf": (
        lark(r'start: %json {"type":"integer","multiple\u004ff":999983}'), "multipleOf",
    ),
    "no end": (lark('start: start "a"'), "no text"),
    "50,000 alternatives": (
        lark("start: " + " | ".join(f'"{one:x}"' for one in range(12_000))), "64 KiB",
    ),
    "deep rules": (lark("start: " + "(" * 5000 + '"a"' + ")" * 5000), "500 levels"),
    "unknown name": (lark("start: b"), "not defined (line 1, column 8)"),
    "brackets": (lark("start: a" + "\na[a" * 15_000), "attributes of a rule"),
    "quotes": (lark('start: "' + '\\"' * 30_000), "has no end"),
    "slashes": (lark("start: /" + "\\/" * 30_000), "has no end"),
    "blanks": (lark(" " * 100_000 + "x"), "64 KiB"),
    "lines": (lark(" \n" * 60_000 + "x"), "64 KiB"),
    "nul": (lark('start: "\x00"'), "not valid"),
    "stop": (lark('start: a "b"\na[stop="q"]: /x*/'), "attribute stop"),
    "max_tokens": (lark('start: a "b"\na[max_tokens=3]: /x*/'), "attribute max_tokens"),
    "deep ::=": (lark("root ::= " + "(" * 3000 + '"a"' + ")" * 3000), "not valid"),
    "open ::=": (lark('root ::= "abc'), "not valid"),
    "long ::=": (
        lark("root ::= r0\n" + "".join(f'r{one} ::= "a" r{one + 1}\n' for one in range(1000))),
        "16 KiB",
    ),
}  # fmt: skip

# Compiled, and followed within limits.
ACCEPTED: dict[str, Grammar] = {
    "nested plus": regex("(a+)+b"),
    "1000 x 1000": regex("a{1,1000}{1,1000}"),
    "any 1000 x 1000": regex("(.{1,1000}){1,1000}"),
    "exponential automaton": regex("(a|b)*a(a|b){20}"),
    "its mirror": regex("(?s:.*)a(?s:.){25}"),
    "three loops": regex("((.{0,100}a){0,100}b){0,100}"),
    "letters": regex(r"(\p{L}|\p{N}){1,300}"),
    "count": regex("a{100000}"),
    "anyOf^20": doubled(20, type="string"),
    "depth 20 of objects": doubled(20, **properties(1, type="string")),
    "enum": schema({"enum": [f"v{one}" for one in range(10_000)]}),
    "enum beside a pattern": schema({"enum": [f"c{one}" for one in range(500)],
                                     "pattern": "^[a-z][0-9]+$"}),
    "bounds of numbers": schema(properties(400, type="integer", minimum=0, maximum=100)),
    "patternProperties": schema({
        "type": "object", "patternProperties": {f"^p{one}x$": {} for one in range(100)}}),
    "pattern": schema({"type": "string", "pattern": ".*a.{30}$"}),
    "length": schema({"type": "string", "minLength": 10**6}),
    "items": schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "properties": schema({**properties(500, type=["string", "integer"]),
                          "additionalProperties": False}),
    "left recursion": lark('start: start "a" | "a"'),
    "ambiguity": lark('start: start start start | start start | /./ | ""'),
    "ambiguous rules": lark(
        "start: a+\na: " + " | ".join(f"r{one}" for one in NUMBERS) + "\n" + "".join(
            f"r{one}: /[a-z]+/ r{(one * 7 + 1) % 300} | /[a-z]/\n" for one in NUMBERS)),
    "repetition": lark('start: ("a"{1,1000}){1,1000}'),
    "doubling rules": lark(
        "start: a0\n" + "".join(f"a{one}: a{one + 1} a{one + 1}\n" for one in range(30))
        + 'a30: "x" | ""'),
    "left recursion of ::=": lark('root ::= root "a" | "a"'),
    "rules of ::=": lark(
        "root ::= r0\n" + "".join(f'r{one} ::= "a" r{one + 1} | "b"\n' for one in range(400))
        + 'r400 ::= "c"'),
}  # fmt: skip


def chained(length: int, **keywords: object) -> Grammar:
    """Definitions, each of which refers to the next one inside of `keywords`, which hold `next`."""

    def level(name: str) -> Any:
        reference = json.dumps({"$ref": f"#/$defs/{name}"})
        return json.loads(json.dumps(keywords).replace('"next"', reference))

    levels = {f"d{one}": level(f"d{one + 1}") for one in range(length)}
    return schema({"$ref": "#/$defs/d0", "$defs": {**levels, f"d{length}": {"type": "string"}}})


def ruled(length: int, depth: int) -> Grammar:
    """Rules, each of which names the next one inside of groups."""
    left, right = "(" * depth, ")" * depth
    rules = (f'r{one}: {left}"a" r{one + 1}{right}\n' for one in range(length))
    return lark("start: r0\n" + "".join(rules) + f'r{length}: "a"')


# llguidance itself overflows the stack, which ends the process.
CHAINS: dict[str, Grammar] = {
    "anyOf": chained(2500, anyOf=["next", {"type": "null"}]),
    "allOf": chained(3000, allOf=["next"]),
    "properties": chained(1500, type="object", properties={"a": "next"}),
    "items": chained(2500, type="array", items="next"),
    "prefixItems": chained(2500, type="array", prefixItems=["next"]),
    "references alone": schema(
        {"$ref": "#/0", **{str(one): {"$ref": f"#/{one + 1}"} for one in range(6000)}}
    ),
    "circle": schema({str(one): {"$ref": f"#/{(one + 1) % 6000}"} for one in range(6000)}
                     | {"$ref": "#/0"}),
    "anchors": schema({"$ref": "#a0", "$defs": {
        str(one): {"$anchor": f"a{one}", "$ref": f"#a{one + 1}"} for one in range(3000)}}),
    "bases": schema({"$id": "http://x/", "$ref": "a0", "$defs": {
        str(one): {"$id": f"a{one}", "$ref": f"a{one + 1}"} for one in range(3000)}}),
    "padded indices": schema({"$ref": "#/x/0", "x": [
        {"$ref": f"#/x/{'+' * (one % 2)}{'0' * 9}{one + 1}"} for one in range(4000)]}),
    "escaped names": schema({"$ref": "#/" + 12 * "$", 12 * "$": {"prefixItems": [
        {"$ref": "#/" + "".join("%24" if one >> bit & 1 else "$" for bit in range(12))}
        for one in range(4000)]}}),
    "rules": ruled(3000, 0),
    "rules of groups": ruled(500, 20),
}  # fmt: skip
LONGEST = (
    chained(199, type="array", prefixItems=["next"]),
    chained(199, type="object", properties={"a": "next"}),
    ruled(498, 0),
    ruled(45, 10),
)
