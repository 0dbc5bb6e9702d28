"""The answer to /v1/responses: a whole response object, or a stream of named events."""

import secrets
from collections.abc import Callable, Iterable
from time import time
from typing import Any, TypeAlias

import msgspec

from sagellm.gateway.answers.event_stream import named_event
from sagellm.gateway.answers.logprobs import Texts
from sagellm.gateway.answers.objects import ApiUsage
from sagellm.gateway.answers.output_items import OutputItems
from sagellm.gateway.answers.responses_objects import (
    FaultCode,
    IncompleteDetails,
    OutputItem,
    ResponseFault,
    ResponseObject,
    ResponseStatus,
    response_usage,
)
from sagellm.gateway.answers.writer import FINISH, AnswerSpec, Indexed
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.messages import TokenEvent

KeepItems: TypeAlias = Callable[[Iterable[OutputItem]], None]

PREFIX = "resp_"
_INCOMPLETE = {
    "length": IncompleteDetails("max_output_tokens"),
    "content_filter": IncompleteDetails("content_filter"),
}


def _code_of(error: ApiError) -> FaultCode:
    """Return the code of a failed response: the API has few that can be true here."""
    return "rate_limit_exceeded" if error.status == 429 else "server_error"


class ResponsesForm:
    """Writes the answer to one response, which has one choice.

    A stream has no [DONE]: its last event is response.completed, .incomplete or .failed.
    """

    def __init__(
        self,
        echo: ResponseObject,
        asked: AnswerSpec,
        texts: Texts,
        *,
        keep: KeepItems | None = None,
    ) -> None:
        """`echo`: a response with the fields that repeat the request.

        `keep`: takes the items of the finished response, before its last bytes are returned.
        """
        self._begin = msgspec.structs.replace(
            echo, id=asked.id, created_at=asked.created, model=asked.model
        )
        # Not from the call's id: clients choose it, and may use it again.
        self._output = OutputItems(asked, texts, secrets.token_hex(16))
        self._keep = keep
        self._incomplete: IncompleteDetails | None = None
        self._num_events = 0

    def opening(self, usage: ApiUsage | None) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def chunk(self, index: int, event: TokenEvent, usage: ApiUsage | None) -> bytes:
        if index:  # an operator has made more choices than the one that was asked for
            return b""
        return b"".join(
            self._event(f"response.{kind}", **fields) for kind, fields in self._added(event)
        )

    def ending(self, usage: ApiUsage) -> bytes:
        response = self._ended(usage)
        return self._event(f"response.{response.status}", response=response)

    def failure(self, error: ApiError) -> bytes:
        """Return the events of an error: `error`, and response.failed with the items so far."""
        # Clients need response.created first, also where an error comes before the first token.
        opening = b"" if self._num_events else self.opening(None)
        told = {"code": error.code or error.type, "message": error.message, "param": error.param}
        failed = self._response("failed", error=ResponseFault(_code_of(error), error.message))
        return b"".join(
            (opening, self._event("error", **told), self._event("response.failed", response=failed))
        )

    def whole(self, choices: Iterable[Indexed], usage: ApiUsage) -> bytes:
        _, event = next(iter(choices))
        for _ in self._added(event):
            pass  # nobody is told of the items as they grow
        return msgspec.json.encode(self._ended(usage))

    def _added(self, event: TokenEvent) -> Iterable[tuple[str, dict[str, Any]]]:
        if event.finish_reason is not None:
            self._incomplete = _INCOMPLETE.get(FINISH[event.finish_reason] or "")
        return self._output.add(event)

    def _ended(self, usage: ApiUsage) -> ResponseObject:
        if self._keep is not None:
            self._keep(self._output.items)
        return self._response(
            "completed" if self._incomplete is None else "incomplete",
            completed_at=int(time()) if self._incomplete is None else None,
            incomplete_details=self._incomplete,
            usage=response_usage(usage),
        )

    def _response(self, status: ResponseStatus, **fields: Any) -> ResponseObject:
        items = list(self._output.items)
        return msgspec.structs.replace(self._begin, status=status, output=items, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return named_event(kind, msgspec.json.encode(content))
