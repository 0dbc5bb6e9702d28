"""Why a choice was not served, as the error that its client is told."""

from collections.abc import Callable

from sagellm.gateway.failure import ApiError
from sagellm.runtime.messages import OPERATOR_FAILED, SERVED, TokenEvent

_OVERLOADED = {
    "queue_full": "the server has too much to do; try again later",
    "slo_unreachable": "the first token would come too late; try again later",
    "unavailable": "no engine is there to serve the request; try again later",
}
_RETRY_S = 1.0  # where the graph does not say when
MayRetry = Callable[[], bool]


def error_of(event: TokenEvent, request_id: str, may_retry: MayRetry) -> ApiError | None:
    """None where the choice goes on, or was served. `may_retry` is asked of an overload only."""
    reason = event.finish_reason
    if reason is None or reason in SERVED or reason == "filtered":
        return None
    if reason == "refused":
        return _refused(event, may_retry)
    if reason == "expired":
        return ApiError(504, "the time that the request allowed is over", code="timeout")
    if reason == "cancelled":
        return _cancelled(event.code)
    if event.code == "request_quarantined":
        told = "the request made engines fail, and is not tried again"
        return ApiError(500, told, code=event.code, should_retry=False)
    if event.code == OPERATOR_FAILED:
        told = f"{event.error}; the server's log has it under request {request_id}"
        return ApiError(500, told, code=event.code)
    told = f"internal error; the operator finds it under request {request_id}"
    return ApiError(500, told, code="engine_failed")


def _refused(event: TokenEvent, may_retry: MayRetry) -> ApiError:
    if event.code == "bad_request":
        return ApiError(400, event.error or "the model cannot serve this request")
    if event.code not in _OVERLOADED:  # by an operator of the user's own
        return ApiError(400, event.error or "the graph refused the request", code="refused")
    return ApiError(
        503,
        _OVERLOADED[event.code],
        code=event.code,
        retry_after_s=event.retry_after_s or _RETRY_S,
        should_retry=may_retry(),
    )


def _cancelled(code: str) -> ApiError:
    if code == "slow_reader":
        return ApiError(503, "the answer was not read in time", code=code, should_retry=False)
    if code == "shutting_down":
        return ApiError(503, "the server is shutting down", code=code, retry_after_s=_RETRY_S)
    return ApiError(503, "the operator ended the request", code="abort", should_retry=False)
