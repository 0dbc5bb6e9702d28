"""The arms of an A/B test, from a decision log or from the requests of a simulation.

Requests count in the order of their arrivals, up to the first that is still open. In the order of
their ends, the quick requests of an arm that lets others wait would come first.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeAlias

from sagellm.experiments.confidence import OPEN, ABTest, Comparison, Sums
from sagellm.operators.ab_split import B
from sagellm.runtime.core.decision_log import MAGIC, DecisionReader, shown_effects
from sagellm.runtime.core.events import Event
from sagellm.runtime.messages import SERVED, ChoiceKey
from sagellm.tracing.critical_path import RequestPath, request_paths

BLOCK_S = 60.0
MAX_CORRELATION = 0.3  # of independent blocks, 30 have a greater one in 5 % of cases


class NoArms(ValueError):
    """A file has no requests of an A/B test; `fix`: what to do."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class ArmRequest:
    """One choice of a request with its arm. `unit`: what the arm was chosen by. `end`: its finish
    reason; empty: it is open.
    """

    arm: str
    unit: str
    arrived_s: float
    end: str
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    slo_ttft_s: float | None

    @property
    def is_served(self) -> bool:
        return self.end in SERVED


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric to compare. `scale`: of its values when they are shown, in `unit`."""

    name: str
    title: str
    unit: str
    scale: float
    lower_is_better: bool = True

    def value(self, one: ArmRequest, slo_ttft_s: float | None) -> float | None:
        """The value of a request; None: the request has none. Latencies are those of served
        requests. `slo_ttft_s`: the objective of requests that have none of their own.
        """
        if self.name == "unserved":
            return float(not one.is_served)
        if self.name == "attainment":
            objective_s = one.slo_ttft_s if one.slo_ttft_s is not None else slo_ttft_s
            if objective_s is None:
                return None
            is_met = one.is_served and one.ttft_s is not None and one.ttft_s <= objective_s
            return float(is_met)
        value: float | None = getattr(one, f"{self.name}_s")
        return value if one.is_served else None


METRICS = {
    one.name: one
    for one in (
        Metric("ttft", "TTFT", "ms", 1e3),
        Metric("tpot", "TPOT", "ms", 1e3),
        Metric("e2e", "end to end", "ms", 1e3),
        Metric("attainment", "objective met", "%", 100.0, lower_is_better=False),
        Metric("unserved", "not served", "%", 100.0),
    )
}


@dataclass(frozen=True, slots=True)
class ArmsComparison:
    """One metric of both arms, at the end of the data.

    `verdict`: that of the sequential rule, after the request number `decided_at` of those that have
    the metric; None: it is still open. `num_more`: the requests that would decide it if all stays
    alike; None: unknown, or too many. `correlation`: of the difference, from one block of time to
    the next; None: few blocks.
    """

    metric: Metric
    num_a: int
    num_b: int
    units_a: int
    units_b: int
    num_blocks: int
    correlation: float | None
    found: Comparison
    verdict: str
    decided_at: int | None
    num_more: int | None

    @property
    def is_dependent(self) -> bool:
        """Whether the blocks of time are too short: the intervals are then too narrow."""
        return self.correlation is not None and self.correlation > MAX_CORRELATION


@dataclass(slots=True)
class _Progress:
    """One metric, while requests come. The rule is applied after each."""

    metric: Metric
    test: ABTest
    margin: float
    sums: Sums = field(default_factory=Sums)
    verdict: str = OPEN
    decided_at: int | None = None

    def add(self, one: ArmRequest, block: int, slo_ttft_s: float | None) -> None:
        value = self.metric.value(one, slo_ttft_s)
        if value is None:
            return
        self.sums.add(one.unit, block, value, is_b=one.arm == B)
        if self.decided_at is None and self.sums.is_enough:
            found = self.test.compare(self.sums)
            self.verdict = self.test.verdict(
                found,
                lower_is_better=self.metric.lower_is_better,
                margin=self.margin * abs(found.mean_a),
            )
            if self.verdict != OPEN:
                self.decided_at = self.sums.num

    def result(self) -> ArmsComparison | None:
        """The comparison; None if an arm has no request with the metric."""
        sums, a, b = self.sums, self.sums.a, self.sums.b
        if not a.num or not b.num:
            return None
        found = self.test.compare(sums)
        growth = None if self.decided_at else self.test.growth_needed(found)
        return ArmsComparison(
            self.metric,
            a.num,
            b.num,
            a.num_units,
            b.num_units,
            sums.blocks.num_blocks,
            sums.blocks.correlation,
            found,
            self.verdict,
            self.decided_at,
            None if growth is None else round(sums.num * (growth - 1)),
        )


def compare_arms(
    requests: Iterable[ArmRequest],
    test: ABTest,
    *,
    block_s: float = BLOCK_S,
    margin: float = 0.0,
    slo_ttft_s: float | None = None,
) -> list[ArmsComparison]:
    """Compare the arms by each metric.

    `block_s`: requests that arrive within so many seconds share queues; it should be several times
    as long as a burst. `margin`: a difference of this share of arm a's mean does not matter.
    """
    progress = [_Progress(metric, test, margin) for metric in METRICS.values()]
    for one in takewhile(lambda one: one.end, sorted(requests, key=lambda one: one.arrived_s)):
        for each in progress:
            each.add(one, int(one.arrived_s // block_s), slo_ttft_s)
    return [found for each in progress if (found := each.result()) is not None]


def read_arms(path: Path, operator: str | None = None) -> list[ArmRequest]:
    """The requests of a decision log, or of the CSV of `sagellm simulate`.

    `operator`: the `ab_split` of a log with several.

    Raises OSError, LogError and NoArms.
    """
    with path.open("rb") as file:
        is_log = file.read(len(MAGIC)) == MAGIC or not path.name.endswith(".csv")
        if is_log:
            file.seek(0)
            return _of_log(DecisionReader(file), operator)
    if operator is not None:
        raise NoArms("--operator is of decision logs", "leave it out: a CSV has one arm a request")
    with path.open(newline="", encoding="utf-8") as text:
        return _of_rows(list(csv.DictReader(text)))


def _of_log(reader: DecisionReader, operator: str | None) -> list[ArmRequest]:
    noted: dict[str, _Notes] = {}
    paths = {(one.request_id, one.choice): one for one in request_paths(_noting(reader, noted))}
    if not noted:
        fix = "give the graph an operator ab_split, and log its decisions with --decisions"
        raise NoArms("no request of this log was assigned to an arm", fix)
    if operator is None and len(noted) > 1:
        raise NoArms(f"{', '.join(noted)} assign arms", "choose one of them with --operator")
    if operator is not None and operator not in noted:
        raise NoArms(f"{operator} assigns no arms", f"choose one of {', '.join(noted)}")
    arms = noted[operator if operator is not None else next(iter(noted))]
    return [_of_path(note, paths.get(key)) for key, note in arms.items()]


_Notes: TypeAlias = dict[ChoiceKey, Mapping[str, Any]]


def _noting(
    reader: DecisionReader, noted: dict[str, _Notes]
) -> Iterator[tuple[float, Event, bytes]]:
    """The events of a log; keeps the assignment of each choice, by operator."""
    for now, event, effects in reader:
        for effect in shown_effects(effects) if b"\xa5noted" in effects else ():
            if effect[0] == "noted" and effect[2]["type"] == "arm":
                note: Mapping[str, Any] = effect[2]
                noted.setdefault(effect[1], {})[note["request_id"], note["choice"]] = note
        yield now, event, effects


def _of_path(note: Mapping[str, Any], path: RequestPath | None) -> ArmRequest:
    arm, unit, arrived_s = note["label"], note["unit"], note["arrived_s"]
    if path is None:
        return ArmRequest(arm, unit, arrived_s, "", None, None, 0.0, note["slo_ttft_s"])
    tpot_s = None
    if path.first_s is not None and path.num_tokens > 1:
        tpot_s = (path.ended_s - path.first_s) / (path.num_tokens - 1)
    times = path.ttft_s, tpot_s, path.e2e_s
    return ArmRequest(arm, unit, arrived_s, path.end, *times, path.slo_ttft_s)


def _of_rows(rows: Sequence[Mapping[str, str]]) -> list[ArmRequest]:
    if not rows or "arm" not in rows[0] or not any(row["arm"] for row in rows):
        fix = "give the graph an operator ab_split, and simulate it with --csv"
        raise NoArms("no request of this table has an arm", fix)
    return [_of_row(row) for row in rows if row["arm"]]


def _of_row(row: Mapping[str, str]) -> ArmRequest:
    def seconds(name: str) -> float | None:
        return float(row[name]) if row[name] else None

    times = seconds("ttft_s"), seconds("tpot_s"), float(row["e2e_s"])
    unit, arrived_s = row["user_id"] or row["number"], float(row["arrived_s"])
    return ArmRequest(row["arm"], unit, arrived_s, row["end"], *times, seconds("slo_ttft_s"))
