"""Random JSON schemas of the kinds that applications send: JSONSchemaBench, arXiv 2501.10868."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
_WORDS = (
    "name",
    "id",
    "kind",
    "items",
    "value",
    "size",
    "tags",
    "count",
    "über",
    "a b",
    'q"t',
    "x",
)
_PATTERNS = (
    r"^[a-z]{2,5}$",
    r"^\d{3}-\d{4}$",
    r"[A-F0-9]+",
    r"^(yes|no)?$",
    r"^\w+@\w+\.com$",
    "^x",
)
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "duration", "hostname")


def random_schema(rng: random.Random) -> Schema:
    """A schema whose values are finite. Half have definitions, some of which are recursive."""
    made = _Making(rng)
    schema = made.object(3) if rng.random() < 0.7 else made.value(3)
    if made.definitions:
        schema["$defs"] = made.definitions
    return schema


class _Making:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Schema] = {}
        if rng.random() < 0.3:
            self.definitions["node"] = self._node()
        if rng.random() < 0.3:
            self.definitions["leaf"] = self.value(0)

    def value(self, depth: int) -> Schema:
        """A schema of any kind. `depth`: how many levels may be nested in it."""
        leaves: list[Callable[[], Schema]] = [
            self.string, self.string, self.integer, self.number, self.listed, self.constant,
            lambda: {"type": self.rng.choice(["boolean", "null"])}, self.reference,
            lambda: {"type": self.rng.sample(["string", "integer", "null", "boolean"], 2)},
        ]  # fmt: skip
        inner = [self.object, self.object, self.array, self.options, self.tagged, self.tuple,
                 self.all_of, self.one_of, self.map]  # fmt: skip
        if depth and self.rng.random() < 0.5:
            return self.rng.choice(inner)(depth - 1)
        return self.rng.choice(leaves)()

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(_WORDS, self.rng.randint(0, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self.value(depth) for name in names},
            "required": [name for name in names if self.rng.random() < 0.6],
        }
        if (others := self.rng.random()) < 0.6:
            schema["additionalProperties"] = False
        elif others < 0.8:
            schema["additionalProperties"] = self.value(0)
        elif others < 0.9:
            schema["patternProperties"] = {"^n_[a-z]$": self.value(0)}
            schema["additionalProperties"] = False
        return schema

    def map(self, depth: int) -> Schema:
        values = {"additionalProperties": self.value(depth)}
        return {"type": "object", "minProperties": 1, "maxProperties": 3} | values

    def array(self, depth: int) -> Schema:
        least = self.rng.randint(0, 2)
        schema = {"type": "array", "items": self.value(depth), "minItems": least}
        return schema | self._maybe(maxItems=least + self.rng.randint(0, 3))

    def tuple(self, depth: int) -> Schema:
        parts = [self.value(depth) for _ in range(self.rng.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}

    def options(self, depth: int) -> Schema:
        return {"anyOf": [self.value(depth) for _ in range(self.rng.randint(2, 3))]}

    def all_of(self, depth: int) -> Schema:
        """An object and what else holds of it, as inheritance is written."""
        parent, name = self.object(depth), self.rng.choice(_WORDS)
        return {"allOf": [parent, {"type": "object", "properties": {name: self.value(0)}}]}

    def one_of(self, depth: int) -> Schema:
        """Options of different types, or of types that overlap: those cannot be compiled."""
        others = [self.string, self.constant, lambda: self.array(depth)]
        return {"oneOf": [self.integer(), self.rng.choice(others)()]}

    def tagged(self, depth: int) -> Schema:
        """A tagged union, as pydantic writes it: of definitions, or in place."""
        tags = self.rng.sample(["cat", "dog", "cow", "hen"], self.rng.randint(2, 3))
        options: list[Schema] = []
        for tag in tags:
            option = self.object(depth)
            option["properties"] = {"type": {"const": tag}} | option["properties"]
            option["required"] = ["type", *option["required"]]
            if self.rng.random() < 0.5:
                name = f"{tag}{len(self.definitions)}"
                self.definitions[name] = option
                option = {"$ref": f"#/$defs/{name}"}
            options.append(option)
        return {"oneOf": options, "discriminator": {"propertyName": "type"}}

    def string(self) -> Schema:
        match self.rng.randint(0, 4):
            case 0:
                return {"type": "string", "pattern": self.rng.choice(_PATTERNS)}
            case 1:
                return {"type": "string", "format": self.rng.choice(_FORMATS)}
            case 2:
                least = self.rng.randint(0, 3)
                return {"type": "string", "minLength": least, "maxLength": least + 5}
        return {"type": "string"} | self._maybe(description="a text", minLength=1)

    def integer(self) -> Schema:
        least = self.rng.randint(-50, 50)
        schema = self._maybe(minimum=least, maximum=least + self.rng.choice([0, 7, 1000]))
        return {"type": "integer"} | schema | self._maybe(0.2, multipleOf=self.rng.choice([2, 5]))

    def number(self) -> Schema:
        least = self.rng.choice([-2.5, 0, 0.125, 10])
        schema = self._maybe(exclusiveMinimum=least, exclusiveMaximum=least + 7.25)
        return {"type": "number"} | (schema or self._maybe(minimum=least, multipleOf=0.5))

    def listed(self) -> Schema:
        values = ["red", "green", "größer", 1, -2.5, True, None, 'with "quotes"', [1], {"a": "b"}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 4))}

    def constant(self) -> Schema:
        return {"const": self.rng.choice(["fixed", 7, None, False, {"k": [1, "x"]}])}

    def reference(self) -> Schema:
        if not self.definitions:
            return self.string()
        return {"$ref": f"#/$defs/{self.rng.choice(list(self.definitions))}"}

    def _node(self) -> Schema:
        """A tree: its children may be missing or none, so that it has finite values."""
        node = {"$ref": "#/$defs/node"}
        return {
            "type": "object",
            "properties": {
                "value": self.value(0),
                "children": {"type": "array", "items": node, "maxItems": 2},
                "next": {"anyOf": [{"type": "null"}, node]},
            },
            "required": ["value"],
            "additionalProperties": False,
        }

    def _maybe(self, share: float = 0.5, **keywords: object) -> Schema:
        return {key: value for key, value in keywords.items() if self.rng.random() < share}
