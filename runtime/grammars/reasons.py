"""What a client is told about a grammar: the reason, without text of the grammar.

The messages of llguidance quote the grammar, so each is replaced by a text of our own.
"""

import re

MAX_NAMES = 8
_KEYWORD = re.compile(
    r"""
    (?<![\w$])(?:
        \$(?:defs|ref|dynamicAnchor|dynamicRef|recursiveAnchor|recursiveRef) | additionalItems
      | additionalProperties | allOf | anyOf | const | contains | definitions | dependencies
      | dependentRequired | dependentSchemas | else | enum | exclusiveMaximum | exclusiveMinimum
      | format | if | items | maxContains | maxItems | maxLength | maxProperties | maximum
      | minContains | minItems | minLength | minProperties | minimum | multipleOf | not | oneOf
      | patternProperties | pattern | prefixItems | propertyNames | properties | required | then
      | type | unevaluatedItems | unevaluatedProperties | uniqueItems
    )(?!\w)
    """,
    re.VERBOSE,
)
_PLACE = re.compile(r"(?:at )?(\d{1,7})\((\d{1,7})\):")

# A part of a message of llguidance 1.9 -> the reason. {names}: the JSON schema keywords after it.
# The first that is found counts.
_REASONS: tuple[tuple[str, str], ...] = (
    ("Unimplemented keys: ", "the schema has keywords that are not supported: {names}"),
    ("Unknown format: ", "the schema has a format that is not supported"),
    ("Invalid type: ", "the schema has a type that JSON does not have"),
    ("is not present in a registry", "$ref: only references into the schema itself are followed"),
    ("Pointer '", "$ref: the schema has nothing at its target"),
    ("Anchor '", "$ref: the schema has nothing at its target"),
    ("circular references", "$ref: a circular reference beside other keywords is not supported"),
    ("oneOf constraints", "oneOf: options that a value could match together are not supported; give"
     " each a required property with a const of its own, or use anyOf"),
    ("Unsatisfiable schema", "no text can satisfy the schema"),
    ("not disjoint", "patternProperties: a name may match only one of the patterns"),
    ("are disjoint", "patternProperties: a name may match only one of the patterns"),
    ("min/maxProperties only", "minProperties and maxProperties are supported only if all"
     " properties are required"),
    ("float range", "minimum and maximum: the numbers are too large or have too many digits"),
    ("integer range", "minimum and maximum: the numbers are too large or have too many digits"),
    ("too many digits", "multipleOf: the number has too many digits"),
    ("invalid multiple of", "multipleOf: the number is not above 0"),
    ("recursion limit exceeded", "the schema is nested too deeply"),
    ("stack level exceeded", "the schema combines schemas too deeply"),
    ("nested too deeply", "the grammar is nested too deeply"),
    ("number of nested", "a regular expression is nested too deeply"),
    ("look-around", "a regular expression has a look-ahead or look-behind: these are not"
     " supported"),
    ("lookarounds not supported", "a regular expression has an anchor or a word boundary inside:"
     " these are not supported"),
    ("backreferences", "a regular expression has a back-reference: these are not supported"),
    ("regex parse error", "a regular expression is not valid"),
    ("invalid regex", "a regular expression is not valid"),
    ("too large", "the grammar is too large"),
    ("too big", "the grammar is too large"),
    ("max is", "the grammar allows too many alternatives at one place"),
    ("Too many items", "the grammar allows too many alternatives at one place"),
    ("too many states", "the grammar is too complex"),
    ("too many expressions", "the grammar is too complex"),
    ("fuel", "the grammar is too complex"),
    ("precomputation", "the grammar is too complex"),
    ("NoExtension", "no text that the model can write belongs to the grammar"),
    ("Expected ", "the schema has a value of a wrong type: {names}"),
    ("must be a", "the schema has a value of a wrong type: {names}"),
    ("unknown special token", "the model has no special token of that name"),
    ("Token range end", "the model has no token of that number"),
    ("unknown name", "a name is not defined"),
    ("unknown grammar", "a name is not defined"),
    ("no start rule", "there is no rule named start"),
    ("circular reference", "a terminal refers to itself"),
    ("duplicate", "a name is defined twice"),
    ("Unknown common regex", "an imported name is not known"),
    ("Unable to determine", "regular expressions that must hold together are too complex"),
    ("hex escape", "the schema is not Unicode text"),
    ("surrogate", "the schema is not Unicode text"),
    ("parametric", "a rule needs parameters that it does not have"),
    ("not supported", "a construct is not supported"),
    ("lexer error", "the syntax is not valid"),
    ("Empty grammar", "the grammar is empty"),
)  # fmt: skip
_OTHER = "the grammar is not valid"


def reason(message: str, *, has_lines: bool = False) -> str:
    """Return the reason that a client is told for a message of llguidance.

    `has_lines`: llguidance was given the client's own lines, so that their numbers are of use.
    """
    place = _PLACE.match(message)
    where = f" (line {place[1]}, column {place[2]})" if place and has_lines else ""
    return f"{_cause(message, is_syntax=bool(place))}{where}"


def _cause(message: str, *, is_syntax: bool) -> str:
    if is_syntax and "Expected" in message:
        return "the syntax is not valid"
    names = _keywords(message)
    for part, text in _REASONS:
        if part in message and (names or "{names}" not in text):
            return text.format(names=", ".join(names))
    return _OTHER


def _keywords(message: str) -> list[str]:
    """The JSON schema keywords in a message, each once; none of the value that it quotes."""
    found = _KEYWORD.findall(message.partition(", got ")[0][:1000])
    return list(dict.fromkeys(found))[:MAX_NAMES]
