"""Errors of a translated body, with the names that the fields have in the client's own body."""

import re
from collections.abc import Mapping

from sagellm.gateway.api_errors import ApiError

_STEP_ENDS = re.compile(r"[.\[]")


def renamed_error(error: ApiError, places: Mapping[str, str]) -> ApiError:
    """Return an error about a field of the translation as an error about the client's field.

    `places`: field of the translation -> field of the client's body. A field without a place is
    named by the nearest field around it that has one.
    """
    if error.param is None:
        return error
    param, message = place_of(error.param, places), error.message
    if message.startswith(f"{error.param}:"):
        message = param + message[len(error.param) :]
    return ApiError(
        error.status,
        message,
        param=param,
        code=error.code,
        retry_after_s=error.retry_after_s,
        should_retry=error.should_retry,
    )


def place_of(param: str, places: Mapping[str, str]) -> str:
    """Return the place of a field in the client's body."""
    ends = [len(param), *reversed([found.start() for found in _STEP_ENDS.finditer(param)])]
    for end in ends:
        if param[:end] in places:
            return places[param[:end]] + param[end:]
    return param
