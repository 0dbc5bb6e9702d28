"""Budgets of operators: which share of a request's latency objectives each operator may spend, and
has spent.

The TTFT budget of a request is its objective for the first token; the TPOT budget that for the mean
time per token after the first. Each operator on the path of the request gets a share: that of the
section `budgets` of the graph, or else a part of what is left, in proportion to the mean time that
the operator has taken.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from sagellm.graphs.ir import Graph
from sagellm.graphs.sections import BudgetOptions, budget_options
from sagellm.graphs.vocabulary import Vocabulary
from sagellm.runtime.executors.tasks import Shell
from sagellm.tracing.critical_path import PathPhase, PathTracker, RequestPath

BudgetName: TypeAlias = Literal["ttft", "tpot"]
_SOURCE = "source"  # where a request waits in a graph without a queue
_LATEST = 256  # requests


class OperatorShare(NamedTuple):
    """The budget of one operator for one request, in seconds; of TPOT, in seconds per token.

    `slack_s`: what was left of the allowances up to this operator when the request left it.
    """

    budget: BudgetName
    operator: str
    share: float
    allowed_s: float
    spent_s: float
    slack_s: float

    @property
    def is_missed(self) -> bool:
        """Whether the operator spent more than its own allowance."""
        return self.spent_s > self.allowed_s


class OperatorBudget(msgspec.Struct, frozen=True):
    """The budget of one operator over all requests with an objective that passed it; means, in
    milliseconds. `misses`: requests for which it spent more than its allowance. `slack_ms`: left
    when requests left the operator; `latest_slack_ms`: of the latest _LATEST requests;
    `least_slack_ms`: of the request with the least.
    """

    budget: BudgetName
    operator: str
    requests: int
    misses: int
    share: float
    allowed_ms: float
    spent_ms: float
    slack_ms: float
    latest_slack_ms: float
    least_slack_ms: float


@dataclass(slots=True)
class _Total:
    """Sums over the requests that passed one operator."""

    requests: int = 0
    misses: int = 0
    share: float = 0.0
    allowed_s: float = 0.0
    spent_s: float = 0.0
    slack_s: float = 0.0
    least_slack_s: float = float("inf")
    latest_slack_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))

    def add(self, one: OperatorShare) -> None:
        self.requests += 1
        self.misses += one.is_missed
        self.share += one.share
        self.allowed_s += one.allowed_s
        self.spent_s += one.spent_s
        self.slack_s += one.slack_s
        self.least_slack_s = min(self.least_slack_s, one.slack_s)
        self.latest_slack_s.append(one.slack_s)


def followed(executor: Shell) -> list[RequestPath]:
    """The list to which the path of each request is added, if the graph has a section `budgets`."""
    paths: list[RequestPath] = []
    if budget_options(executor.plan.graph) is not None:
        executor.recorders.append(PathTracker(paths.append).observe)
    return paths


def watch(
    executor: Shell, vocabulary: Vocabulary, slo_ttft_s: float | None = None
) -> "BudgetMeter | None":
    """Meter the budgets of a graph that runs. None for a graph without a section `budgets`."""
    graph = executor.plan.graph
    if budget_options(graph) is None:
        return None
    meter = BudgetMeter(graph, vocabulary, slo_ttft_s=slo_ttft_s)
    executor.recorders.append(PathTracker(meter.observe).observe)
    return meter


class BudgetMeter:
    """Divides the budgets of requests among operators. `slo_ttft_s`, `slo_tpot_s`: objectives of
    requests, if neither the request nor the graph has one.
    """

    def __init__(
        self,
        graph: Graph,
        vocabulary: Vocabulary,
        *,
        slo_ttft_s: float | None = None,
        slo_tpot_s: float | None = None,
    ) -> None:
        options = budget_options(graph) or BudgetOptions()
        self._slo_ttft_s = _first(options.slo_ttft_s, slo_ttft_s)
        self._slo_tpot_s = _first(options.slo_tpot_s, slo_tpot_s)
        self._explicit: Mapping[BudgetName, Mapping[str, float]] = {
            "ttft": options.ttft_shares, "tpot": options.tpot_shares,
        }  # fmt: skip
        self._queues = _queues(graph, vocabulary)
        self._taken: dict[tuple[BudgetName, str], tuple[int, float]] = {}  # requests and seconds
        self._totals: dict[tuple[BudgetName, str], _Total] = {}

    def observe(self, path: RequestPath) -> None:
        """Learn from a request that has ended, and count it."""
        self.learn(path)
        self.count(path)

    def learn(self, path: RequestPath) -> None:
        """Add the times of a request to the means that divide what explicit shares leave."""
        for budget, spent in self._spent(path):
            for operator, seconds in spent.items():
                number, total_s = self._taken.get((budget, operator), (0, 0.0))
                self._taken[budget, operator] = number + 1, total_s + seconds

    def count(self, path: RequestPath) -> None:
        """Count the slack and the misses of a request."""
        for one in self.divide(path):
            self._totals.setdefault((one.budget, one.operator), _Total()).add(one)

    def divide(self, path: RequestPath) -> list[OperatorShare]:
        """The budgets of a request, by operator in the order of its path. Only budgets with an
        objective, of a request that got its first token; TPOT from two tokens on.
        """
        found = []
        for budget, spent in self._spent(path):
            own_s = _first(path.slo_ttft_s, self._slo_ttft_s)
            objective_s = own_s if budget == "ttft" else self._slo_tpot_s
            if objective_s is None:
                continue
            left_s = 0.0
            for operator, share in self._shares(budget, spent).items():
                allowed_s, spent_s = share * objective_s, spent[operator]
                left_s += allowed_s - spent_s
                found.append(OperatorShare(budget, operator, share, allowed_s, spent_s, left_s))
        return found

    def report(self) -> list[OperatorBudget]:
        """The budgets of all operators over all counted requests."""
        return [_summary(*key, total) for key, total in self._totals.items()]

    def _shares(self, budget: BudgetName, operators: Iterable[str]) -> dict[str, float]:
        """The shares of the operators on the path of a request; they sum to 1, or to the explicit
        shares if no other operator has taken time.
        """
        explicit = self._explicit[budget]
        means = {name: self._mean_s(budget, name) for name in operators if name not in explicit}
        left = 1.0 - sum(explicit[name] for name in operators if name in explicit)
        whole_s = sum(means.values())
        return {
            name: explicit[name] if name in explicit else left * _over(means[name], whole_s)
            for name in operators
        }

    def _mean_s(self, budget: BudgetName, operator: str) -> float:
        number, total_s = self._taken.get((budget, operator), (0, 0.0))
        return _over(total_s, number)

    def _spent(self, path: RequestPath) -> list[tuple[BudgetName, dict[str, float]]]:
        """The seconds of a request in each operator: until its first token, and per token later.
        Operators without time and without an explicit share are left out.
        """
        if path.first_s is None:
            return []
        first_s, num_later = path.first_s, path.num_tokens - 1
        ttft = self._by_operator("ttft", path, lambda one: min(one.end_s, first_s) - one.begin_s)
        if num_later < 1:
            return [("ttft", ttft)]
        later = self._by_operator(
            "tpot", path, lambda one: (one.end_s - max(one.begin_s, first_s)) / num_later
        )
        return [("ttft", ttft), ("tpot", later)]

    def _by_operator(
        self, budget: BudgetName, path: RequestPath, seconds: Callable[[PathPhase], float]
    ) -> dict[str, float]:
        queue = self._queues.get(path.operators[0], _SOURCE) if path.operators else _SOURCE
        found = dict.fromkeys((queue, *path.operators), 0.0)
        for phase in path.phases:
            name = phase.where.partition("[")[0] or queue
            found[name] += max(seconds(phase), 0.0)
        explicit = self._explicit[budget]
        return {name: taken for name, taken in found.items() if taken or name in explicit}


def budget_report(meter: BudgetMeter, paths: Sequence[RequestPath]) -> list[OperatorBudget]:
    """The budgets of operators over whole paths, with shares by the mean times of all of them."""
    for path in paths:
        meter.learn(path)
    for path in paths:
        meter.count(path)
    return meter.report()


COLUMNS = ("budget", "operator", "share", "allowed ms", "spent ms", "slack ms", "missed")


def budget_row(one: OperatorBudget) -> tuple[str, ...]:
    """The texts of a row under `COLUMNS`. Times of TPOT are milliseconds per token."""
    times = [f"{each:.1f}" for each in (one.allowed_ms, one.spent_ms, one.slack_ms)]
    return one.budget, one.operator, f"{one.share:.1%}", *times, f"{one.misses} of {one.requests}"


def share_row(one: OperatorShare) -> tuple[str, ...]:
    """The texts of a row under `COLUMNS` for one request."""
    times = [f"{each * 1e3:.1f}" for each in (one.allowed_s, one.spent_s, one.slack_s)]
    return one.budget, one.operator, f"{one.share:.1%}", *times, "yes" if one.is_missed else ""


def _summary(budget: BudgetName, operator: str, total: _Total) -> OperatorBudget:
    number = total.requests
    return OperatorBudget(
        budget=budget,
        operator=operator,
        requests=number,
        misses=total.misses,
        share=total.share / number,
        allowed_ms=total.allowed_s / number * 1e3,
        spent_ms=total.spent_s / number * 1e3,
        slack_ms=total.slack_s / number * 1e3,
        latest_slack_ms=fmean(total.latest_slack_s) * 1e3,
        least_slack_ms=total.least_slack_s * 1e3,
    )


def _queues(graph: Graph, vocabulary: Vocabulary) -> dict[str, str]:
    """For each operator the nearest operator upstream in which requests wait."""
    queues = {node.name for node in graph.nodes if _is_queue(vocabulary, node.op)}
    found: dict[str, str] = {}
    for node in graph.topological():
        before = [edge.source for edge in graph.inputs(node.name) if not edge.feedback]
        near = [name if name in queues else found.get(name, _SOURCE) for name in before]
        found[node.name] = next((name for name in near if name != _SOURCE), _SOURCE)
    return found


def _is_queue(vocabulary: Vocabulary, op: str) -> bool:
    spec = vocabulary.get(op)
    return spec is not None and spec.queues


def _first(one: float | None, other: float | None) -> float | None:
    return other if one is None else one


def _over(seconds: float, of: float) -> float:
    return seconds / of if of else 0.0
