"""What a client is told when its request is refused or fails: one exception, one JSON shape."""

from collections.abc import MutableMapping
from typing import Any

import msgspec

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a call. `message` is shown to the client: it never holds a path, a prompt or the text
    of another exception. `retry_after_s` and `should_retry` become headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}, as the OpenAI API has it."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body)


def note_error(scope: MutableMapping[str, Any], error: ApiError) -> None:
    """Remember what the client of a call is told, for the log."""
    scope["state"]["error"] = error.code or error.type


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)
