"""While the gateway drains: no new work, and clients are told to go elsewhere."""

from sagellm.gateway.failure import ApiError

RETRY_AFTER_S = 5.0  # by then a load balancer has taken this gateway out


def draining() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down",
        code="shutting_down",
        retry_after_s=RETRY_AFTER_S,
        should_retry=True,
    )
