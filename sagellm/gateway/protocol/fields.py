"""The fields of one JSON object: known ones are kept, foreign ones judged, others refused."""

from typing import Any

from sagellm.gateway.errors import ApiError, wrong
from sagellm.gateway.protocol.foreign import Foreign, check_taken, refuse_unbuilt
from sagellm.gateway.protocol.json import shown
from sagellm.graphs.vocabulary import nearest

_GUESSED_LEN = 64  # names beyond are nobody's slip, and comparing them takes long


def fields_of(
    value: Any, known: tuple[str, ...], foreign: Foreign, where: str = ""
) -> dict[str, Any]:
    """What the object says, null being unsaid, of whatever field. `where` is its own place:
    "messages[0]".

    Raises ApiError (400) that names the first field which is not served.
    """
    if not isinstance(value, dict):
        raise wrong(where, "must be an object") if where else _no_object()
    return {
        name: said
        for name, said in value.items()
        if _is_said(name, said, known, foreign, f"{where}." if where else "")
    }


def _is_said(name: str, said: Any, known: tuple[str, ...], foreign: Foreign, prefix: str) -> bool:
    if said is None or name in known:
        return said is not None
    if name in foreign.taken:
        check_taken(prefix + name, said, foreign.taken[name])
    elif name in foreign.unbuilt:
        refuse_unbuilt(prefix + name, said, foreign.unbuilt[name])
    else:
        raise _unknown(name, known, prefix)
    return False


def _no_object() -> ApiError:
    return ApiError(400, "the body is no JSON object; send {...}")


def _unknown(name: str, known: tuple[str, ...], prefix: str) -> ApiError:
    close = nearest(name, known) if len(name) <= _GUESSED_LEN else None
    hint = f"; did you mean `{prefix}{close}`?" if close else ""
    plain = shown(name)
    message = f"unknown field {plain}{f' in {prefix[:-1]}' if prefix else ''}{hint}"
    param = prefix + name if plain == f"`{name}`" else prefix[:-1] or None
    return ApiError(400, message, param=param, code="unknown_parameter")
