"""The HTTP metrics of vLLM, as prometheus-fastapi-instrumentator names and labels them."""

from collections.abc import Iterator

from prometheus_client.core import Metric

from sagellm.gateway.metrics.bounds import HANDLER_S
from sagellm.gateway.metrics.families import Labels, counter, histogram
from sagellm.gateway.metrics.meters import NOT_MEASURED, UNKNOWN, Call, HttpMeters
from sagellm.runtime.buckets import Buckets

_NO_HANDLER = "none"  # for a path that is no route


def instrumentator_families(http: HttpMeters) -> Iterator[Metric]:
    """Status codes are grouped, as "2xx"; probes and scrapes are left out, as in vLLM."""
    yield counter("http_requests", "Calls that ended.", _requests(http))
    seconds = [
        (_labels(call), taken)
        for call, taken in http.seconds.items()
        if call.endpoint not in NOT_MEASURED
    ]
    yield histogram("http_request_duration_seconds", "Time of calls.", seconds, HANDLER_S)
    every: list[tuple[Labels, Buckets]] = [({}, http.all_seconds)]
    yield histogram("http_request_duration_highr_seconds", "Time of all calls.", every)


def _requests(http: HttpMeters) -> list[tuple[Labels, float]]:
    grouped: dict[tuple[Call, str], int] = {}
    for (call, status), number in http.responses.items():
        if call.endpoint not in NOT_MEASURED:
            key = call, f"{status // 100}xx"
            grouped[key] = grouped.get(key, 0) + number
    return [
        ({**_labels(call), "status": status}, number) for (call, status), number in grouped.items()
    ]


def _labels(call: Call) -> Labels:
    handler = _NO_HANDLER if call.endpoint == UNKNOWN else call.endpoint
    return {"handler": handler, "method": call.method}
