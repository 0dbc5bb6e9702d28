"""The format of an exposition: Prometheus text wherever it is accepted, else OpenMetrics.

OpenMetrics says nothing that the text format does not, and prometheus_client renames the samples
of `vllm:` families in it: Prometheus, which prefers OpenMetrics, would find none of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics


class Format(NamedTuple):
    """`encode` writes the families of a registry; names are never escaped."""

    encode: Callable[[CollectorRegistry], bytes]
    content_type: str


TEXT = Format(generate_latest, CONTENT_TYPE_PLAIN_0_0_4)
OPEN_METRICS = Format(
    partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8, version="1.0.0"),
    "application/openmetrics-text; version=1.0.0; charset=utf-8",
)
_TEXT_TYPES = frozenset({"text/plain", "text/*", "*/*"})
_OPEN_METRICS_TYPE = "application/openmetrics-text"


def format_of(accept: str) -> Format:
    """The format for an Accept header; text also for a header that names neither format."""
    accepted = set(_media_types(accept))
    return OPEN_METRICS if _OPEN_METRICS_TYPE in accepted and not accepted & _TEXT_TYPES else TEXT


def _media_types(accept: str) -> Iterator[str]:
    """The types that a header accepts; a weight of zero refuses one (RFC 9110, 12.4.2)."""
    for part in accept.lower().split(","):
        media_type, *parameters = (word.strip() for word in part.split(";"))
        weights = [word[2:] for word in parameters if word.startswith("q=")]
        if not any(weight.strip("0.") == "" for weight in weights):
            yield media_type
