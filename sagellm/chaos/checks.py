"""What must hold after a scenario: `identical`, or a comparison of a figure with a number.

A figure is one of the report's (`longest_gap_s < 2`), or a metric that the gateway would show, the
sum of all series that have the labels given (`sagellm_engine_restarts_total{engine="d"} == 1`).
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

from sagellm.chaos.scenario import ScenarioError
from sagellm.graphs.vocabulary import nearest

IDENTICAL = "identical"
_COMPARISON = re.compile(
    r"\s*(?P<name>[a-z_:]+)\s*(\{(?P<labels>[^{}]*)\})?\s*"
    r"(?P<sign>==|!=|<=|>=|<|>)\s*(?P<bound>-?\d+(\.\d+)?)\s*"
)
_LABEL = re.compile(r'\s*(?P<name>[a-z_]+)\s*=\s*"?(?P<value>[^",]*)"?\s*')
_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `checks`."""

    text: str
    name: str
    labels: Mapping[str, str]
    sign: str
    bound: float

    def holds(self, found: float) -> bool:
        return _SIGNS[self.sign](found, self.bound)


def read_check(text: str, figures: Iterable[str]) -> Check:
    """Raises ScenarioError. `figures`: those of the report."""
    if text == IDENTICAL:
        return Check(text, "num_different", {}, "==", 0.0)
    found = _COMPARISON.fullmatch(text)
    if found is None:
        raise ScenarioError(f"check {text!r}: write `identical`, or NAME < NUMBER")
    known = list(figures)
    if found["name"] not in known and not found["name"].startswith(("sagellm_", "vllm:")):
        close = nearest(found["name"], known)
        hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
        raise ScenarioError(f"check {text!r}: no figure {found['name']!r}; {hint}")
    labels = [_LABEL.fullmatch(part) for part in (found["labels"] or "").split(",") if part.strip()]
    if None in labels:
        raise ScenarioError(f'check {text!r}: labels are written name="value"')
    named = {label["name"]: label["value"] for label in labels if label is not None}
    return Check(text, found["name"], named, found["sign"], float(found["bound"]))


def metric_value(families: Iterable[Metric], check: Check) -> float | None:
    """The sum of the series that a check means; None where there is none."""
    values = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == check.name
        and all(sample.labels.get(name) == value for name, value in check.labels.items())
    ]
    return sum(values) if values else None
