"""Each policy against the definition in its docstring."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.yaml import load
from sagellm.opening.checking import check_graph
from sagellm.operators.policies import OWN, POLICIES, find_policy
from sagellm.operators.policies.order import Policy, PolicySortOptions, QueueOrder
from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import PRIORITIES, Request, Stamps

GRAPH = """\
sagellm: 1
name: g
engines:
  g: {model: "null", device: "null"}
operators:
  sort: {op: policy_sort, policy: NAME}
  generate: {op: generate, engine: g}
edges:
  - source -> sort -> generate -> sink
"""


def graph_with(policy: str) -> Any:
    return load(GRAPH.replace("NAME", policy), file="g.yaml")


DOCS = (Path(__file__).parents[3] / "docs" / "graphs.md").read_text()


def ask(arrived_s: float = 0.0, num_tokens: int = 1, **fields: Any) -> Any:
    ids = (1,) * num_tokens
    return Request(
        request_id="r", stamps=Stamps(arrived_s=arrived_s), prompt_token_ids=ids, **fields
    )


def order(name: str, level: int = 0, **options: Any) -> Any:
    return find_policy(name, PolicySortOptions(policy=name, **options)).orders[level]


def ascend(rank: Any, *requests: Any) -> Any:
    return all(rank(one) < rank(other) for one, other in pairwise(requests))


def test_fifo_serves_by_arrival() -> None:
    assert ascend(order("fifo").rank, ask(1.0, priority=4), ask(2.0, priority=0))


def test_priority_goes_before_arrival() -> None:
    rank = order("priority").rank
    assert ascend(rank, *(ask(-level / 10, priority=level) for level in range(5)))
    assert ascend(rank, ask(1.0), ask(2.0))


def test_waiting_outweighs_priority_in_time() -> None:
    rank = order("priority", aging_s=2.0).rank
    background = ask(0.0, priority=PRIORITIES["background"])
    assert rank(ask(7.9, priority=0)) < rank(background) < rank(ask(8.1, priority=0))


def test_slack_is_what_is_left_after_prefill() -> None:
    slo_aware = order("slo_aware", prefill_tokens_per_s=100.0)
    assert slo_aware.lapses
    assert slo_aware.rank(ask(1.0, num_tokens=200, slo_ttft_s=5.0)) == 4.0
    assert slo_aware.rank(ask(1.0, num_tokens=200, num_cached_tokens=100, slo_ttft_s=5.0)) == 5.0


def test_a_late_request_has_half_its_objective_more() -> None:
    slo_aware = order("slo_aware", prefill_tokens_per_s=100.0)
    late = ask(1.0, num_tokens=200, slo_ttft_s=5.0)
    assert slo_aware.later_rank(late, 6.5) == 6.5
    assert slo_aware.later_rank(late, 6.6) == math.inf
    assert slo_aware.later_rank(ask(1.0, num_tokens=100, expires_s=3.0), 2.5) == math.inf


def test_an_objective_comes_before_an_expiry_and_none_is_the_far_future() -> None:
    rank = order("slo_aware", prefill_tokens_per_s=1.0).rank
    assert rank(ask(1.0, slo_ttft_s=5.0, expires_s=3.0)) == 5.0
    assert rank(ask(1.0, expires_s=3.0)) == 2.0
    assert rank(ask(1.0)) == math.inf


def test_least_slack_is_deadline_less_prefill_and_what_is_ahead() -> None:
    least_slack = order("least_slack", prefill_tokens_per_s=100.0)
    request = ask(1.0, num_tokens=200, num_cached_tokens=100, slo_ttft_s=5.0)
    assert least_slack.rank(request) == 5.0  # latest start: 1 + 5 - 100 / 100
    forecast = Forecast()
    for _ in range(20):
        forecast = forecast.after(
            FirstToken(seconds=0.7, num_computed_tokens=50, computed_s=0.5), 0.0
        )
    assert least_slack.ahead_s(forecast) == pytest.approx(0.2)  # 0.7 s in all, 0.5 s of prefill
    assert least_slack.ahead_s(Forecast()) == 0.0


def test_least_slack_has_no_grace_and_late_ones_come_after_best_effort() -> None:
    least_slack = order("least_slack", prefill_tokens_per_s=100.0)
    late, free = ask(1.0, num_tokens=100, slo_ttft_s=1.0), ask(1.0)
    assert least_slack.later_rank(late, 1.0) == 1.0  # slack 0 is not late
    assert least_slack.later_rank(late, 1.1) == math.inf
    assert 1e9 < least_slack.rank(free) < math.inf
    resumed = ask(1.0, slo_ttft_s=1.0, emitted_token_ids=(1,))
    assert least_slack.rank(resumed) == least_slack.rank(free)


def test_weighted_shortest_prefill_is_weight_per_second_when_nothing_ages() -> None:
    rank = order("weighted_shortest_prefill", doubling_s=0.0, prefill_tokens_per_s=100.0).rank
    critical, normal = ask(num_tokens=400, priority=0), ask(num_tokens=100)
    assert rank(critical) == rank(normal) == 1.0  # 4 s / 4, 1 s / 1
    assert rank(ask(num_tokens=100, cost_budget=8.0)) == 1 / 8
    assert rank(ask(num_tokens=100, priority=4)) == 4.0
    assert rank(ask(num_tokens=100, cost_budget=0.0)) == 1024.0  # never infinite


def test_a_wait_of_doubling_s_doubles_the_value() -> None:
    rank = order("weighted_shortest_prefill", doubling_s=2.0, prefill_tokens_per_s=100.0).rank
    waited = ask(0.0, num_tokens=800)
    assert ascend(rank, ask(5.9, num_tokens=100), waited, ask(6.1, num_tokens=100))  # 2 * log2(8)


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5000), st.integers(0, 4)), max_size=9))
def test_the_fixed_rank_is_the_order_of_the_aged_value_at_any_time(drawn: Any) -> None:
    rank = order("weighted_shortest_prefill", prefill_tokens_per_s=100.0).rank
    requests = [ask(at, num_tokens=n, priority=level) for at, n, level in drawn]

    def log_value(request: Any, now: float) -> float:
        """log2 of weight / T_prefill * 2 ** (age / doubling_s)."""
        static = (2 - request.priority) - math.log2(request.num_uncached_tokens / 100)
        return static + (now - request.stamps.arrived_s) / 10.0

    for now in (20.0, 50.0):
        by_value = sorted(log_value(one, now) for one in requests)
        ranked = [log_value(one, now) for one in sorted(requests, key=rank, reverse=True)]
        assert ranked == pytest.approx(by_value, abs=1e-6)


def test_hybrid_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="have engines of their own here"):
        find_policy("hybrid", PolicySortOptions(policy="hybrid"))
    with pytest.raises(GraphError, match="have engines of their own here"):
        check_graph(graph_with("hybrid"), RESOLVER)


def test_cost_optimized_is_smiths_rule() -> None:
    rank = order("cost_optimized").rank
    ratios = [(8.0, 10), (3.0, 6), (None, 4), (1.0, 30), (0.0, 1)]  # value / token descends
    assert ascend(rank, *(ask(num_tokens=n, cost_budget=value) for value, n in ratios))


@given(st.permutations([(1.0, 3), (2.0, 2), (5.0, 9), (0.5, 1)]))
def test_smiths_rule_minimises_weighted_completion(jobs: Any) -> None:
    def cost(sequence: int) -> Any:
        finished = [sum(n for _, n in sequence[: i + 1]) for i in range(len(sequence))]
        return sum(job[0] * end for job, end in zip(sequence, finished, strict=True))

    rank = order("cost_optimized").rank
    best = sorted(jobs, key=lambda job: rank(ask(num_tokens=job[1], cost_budget=job[0])))
    assert cost(best) <= cost(jobs)


def test_adaptive_is_least_slack_then_the_shortest_in_time() -> None:
    calm, busy, overloaded = find_policy("adaptive", PolicySortOptions(policy="adaptive")).orders
    assert calm.grace_s is not None
    slack = order("least_slack").rank
    request = ask(1.0, num_tokens=10, slo_ttft_s=3.0)
    assert calm.rank(request) == slack(request)
    for level in (busy, overloaded):
        assert level.lapses
        due = [ask(9.0, num_tokens=n, slo_ttft_s=99.0 - n) for n in (1, 10, 1000)]
        assert ascend(level.rank, *due, ask(0.0, num_tokens=1))  # without an objective: last
        prefill_s = level.prefill_s(request)
        assert not level.is_late(request, 4.0 - prefill_s)
        assert level.is_late(request, 4.0 - prefill_s + 1e-6)
        assert not level.is_late(ask(0.0), 1e9)
    assert ascend(overloaded.rank, ask(1.0, num_tokens=10), ask(0.0, num_tokens=1000))
    assert busy.rank(ask(1.0, num_tokens=10)) == busy.rank(ask(0.0, num_tokens=1000))  # arrival
    waited = ask(0.0, num_tokens=1000)  # ten times its own prefill of one second
    assert ascend(overloaded.rank, ask(9.9), waited, ask(10.1))


def test_what_resumes_has_no_objective_in_adaptive() -> None:
    _, busy, _ = find_policy("adaptive", PolicySortOptions(policy="adaptive")).orders
    resumed = ask(0.0, slo_ttft_s=1.0, emitted_token_ids=(1,))
    assert not busy.is_late(resumed, 99.0)
    assert ascend(busy.rank, ask(5.0, num_tokens=9000, slo_ttft_s=1.0), resumed)


def test_a_level_holds_until_the_load_has_halved() -> None:
    policy = find_policy(
        "adaptive", PolicySortOptions(policy="adaptive", busy_queued=4, overloaded_queued=8)
    )
    level, levels = 0, []
    for num_waiting in (3, 4, 2, 1, 8, 5, 4, 3, 1):
        level = policy.level(level, num_waiting)
        levels.append(level)
    assert levels == [0, 1, 1, 0, 2, 2, 2, 1, 0]


def test_a_policy_of_one_order_has_one_level() -> None:
    assert Policy((QueueOrder(lambda request: 0.0),)).level(0, 10**6) == 0


def test_the_table_names_each_policy_and_options_that_exist() -> None:
    for name, registered in POLICIES.items():
        made = registered.policy
        parts = re.findall("[A-Z][a-z]*", made.__name__) if isinstance(made, type) else []
        assert ("_".join(parts).lower() or made.__name__) == name
        assert registered.policy.__doc__
        for option in registered.uses:
            assert hasattr(PolicySortOptions(), option)


def test_the_docs_name_the_policies_of_the_table() -> None:
    (row,) = (line for line in DOCS.splitlines() if line.startswith("| `policy_sort` |"))
    listed = row.split("`policy`: ")[1].split("(with")[0]
    assert re.findall(r"`(\w+)`", listed) == [*POLICIES.ours, OWN]


@pytest.mark.parametrize(("name", "hint"), [("slo_awar", "did you mean slo_aware"), ("?", "known")])
def test_an_unknown_policy_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        find_policy(name, PolicySortOptions())
