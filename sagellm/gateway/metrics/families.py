"""Metric families of the Prometheus client, made in one call each."""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from sagellm.runtime.buckets import Buckets

Labels: TypeAlias = Mapping[str, str]
Values: TypeAlias = Iterable[tuple[Labels, float]]


def counter(name: str, documentation: str, values: Values) -> Metric:
    """`name` without `_total`, which the exposition adds."""
    family = CounterMetricFamily(name, documentation)
    for labels, value in values:
        family.add_sample(f"{name}_total", dict(labels), value)
    return family


def gauge(name: str, documentation: str, values: Values) -> Metric:
    family = GaugeMetricFamily(name, documentation)
    for labels, value in values:
        family.add_sample(name, dict(labels), value)
    return family


def histogram(
    name: str,
    documentation: str,
    values: Iterable[tuple[Labels, Buckets]],
    only: Collection[float] | None = None,
) -> Metric:
    """`only`: the bounds that are shown, of those that the buckets have."""
    family = HistogramMetricFamily(name, documentation)
    for labels, buckets in values:
        passed = 0
        for bound, passed in buckets.cumulative():
            if only is not None and bound not in only and bound != float("inf"):
                continue
            family.add_sample(f"{name}_bucket", {**labels, "le": _text(bound)}, passed)
        family.add_sample(f"{name}_count", dict(labels), passed)
        family.add_sample(f"{name}_sum", dict(labels), buckets.total)
    return family


def _text(bound: float) -> str:
    """As Go writes a bound: the clients of other languages compare these as text."""
    return "+Inf" if bound == float("inf") else str(float(bound))
