"""Chats that a body of another API asks for, and errors with the names of the client's fields."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import ChatRequest, chat_request
from sagellm.gateway.settings import RequestLimits

_STEP_ENDS = re.compile(r"[.\[]")


@dataclass(slots=True)
class TranslatedChat:
    """The body of a chat, as parsed JSON, and where its fields come from.

    `places`: field of the chat -> field of the client's body. A field without a place is named by
    the nearest field around it that has one.
    """

    places: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)

    def read(self, limits: RequestLimits) -> ChatRequest:
        """Check the chat as if a client had sent it. Raises ApiError with the client's names."""
        with self.naming():
            return chat_request(self.body, limits)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Raise an ApiError of the block, which is about the chat, with the client's names."""
        try:
            yield
        except ApiError as error:
            raise self.renamed(error) from None

    def renamed(self, error: ApiError) -> ApiError:
        """Return an error of the chat as an error of the client's body."""
        if error.param is None:
            return error
        param, message = place_of(error.param, self.places), error.message
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
