"""A conversation on its way to a helper process that renders it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sagellm.runtime.models.chat import ChatTemplateError, Rendering


def pack(messages: Sequence[Mapping[str, Any]], how: Rendering) -> bytes:
    """A conversation as JSON, which keeps the order of fields, large integers and surrogates."""
    options = {
        "add_generation_prompt": how.add_generation_prompt,
        "continue_final_message": how.continue_final_message,
        "tools": how.tools,
        "variables": how.variables,
    }
    try:
        return json.dumps((list(messages), options), default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"the messages are not JSON: {error}") from error


def unpack(given: bytes) -> tuple[list[dict[str, Any]], Rendering]:
    messages, options = json.loads(given)
    return messages, Rendering(**{**options, "tools": tuple(options["tools"])})


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
