"""Fields that are taken and change no token: their type is checked, then they are dropped."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from sagellm.gateway.failure import wrong


class Taken(NamedTuple):
    """`type`: as JSON schema names it. `note`: why no token depends on the field."""

    type: str
    note: str


Takes: TypeAlias = Mapping[str, Taken]

REQUEST: Takes = {
    "metadata": Taken("object", "labels for the caller's own records"),
    "prediction": Taken("object", "a guess of the answer; `speculation` is set in the graph"),
    "prompt_cache_options": Taken("object", "prefixes are kept in any case"),
    "prompt_cache_retention": Taken("string", "prefixes are kept in any case"),
    "reasoning": Taken("object", "a hint, as `reasoning_effort`"),
    "service_tier": Taken("string", "there is one tier; `priority` orders requests"),
    "store": Taken("boolean", "no answer is stored"),
    "timeout": Taken("number", "the client's own; `timeout_s` ends a request here"),
    "verbosity": Taken("string", "a hint"),
}
MESSAGE: Takes = {
    "cache_control": Taken("object", "prefixes are kept in any case"),
    "id": Taken("string", "no template reads it"),
}
PART: Takes = {
    "cache_control": Taken("object", "prefixes are kept in any case"),
    "prompt_cache_breakpoint": Taken("object", "prefixes are kept in any case"),
}
TOOL_CALL: Takes = {
    "index": Taken("integer", "the place of a call in its list says the same"),
}
_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def check_taken(param: str, value: Any, taken: Taken) -> None:
    """Raise ApiError (400) for a value of another type; null is of every type."""
    if value is None or type(value) in _TYPES[taken.type]:
        return
    article = "an" if taken.type[0] in "aeio" else "a"
    raise wrong(param, f"must be {article} {taken.type}")
