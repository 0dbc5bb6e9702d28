"""The exceptions for a request that entered the graph and was not served."""

from sagellm.prompts import RequestError
from sagellm.runtime.messages import Answer, TokenEvent
from sagellm.runtime.user_code import sentence


class RequestRefused(RequestError):
    """The graph refused the request: the message says why.

    `code` is a key of `CODES` in `sagellm.runtime.messages`, or empty. `retry_after_s`: when
    another attempt makes sense, where the graph says so. `end` is the last event of the choice, or
    its answer as far as it came.
    """

    def __init__(self, end: TokenEvent | Answer) -> None:
        super().__init__(end.error or "the graph refused the request")
        self.end = end
        self.code = end.code
        self.retry_after_s = end.retry_after_s


class RequestFailed(RuntimeError):
    """The request failed in the graph.

    Where the user's own code raised, the message has the operator, the type, the text and
    file:line, and `__cause__` is what was raised. `code` and `end` are as in `RequestRefused`.
    """

    def __init__(self, end: TokenEvent | Answer, cause: BaseException | None = None) -> None:
        super().__init__(sentence(end.error or "the request failed in the graph", cause))
        self.end = end
        self.code = end.code


def raise_unserved(end: TokenEvent | Answer, cause: BaseException | None = None) -> None:
    """Raise RequestRefused or RequestFailed for the last event of a choice that says so.

    Served, filtered, expired and cancelled choices raise nothing: `finish_reason` tells them apart.
    """
    if end.finish_reason == "refused":
        raise RequestRefused(end)
    if end.finish_reason == "failed":
        raise RequestFailed(end, cause) from cause
