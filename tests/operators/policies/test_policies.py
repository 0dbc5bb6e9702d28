"""Each policy against the definition in its docstring."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.operators.policies import OWN, POLICIES, find_policy
from sagellm.operators.policies.order import Policy, PolicySortOptions, QueueOrder
from sagellm.runtime.messages import PRIORITIES, Request, Stamps

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


def test_adaptive_is_fifo_then_slack_then_shortest() -> None:
    calm, busy, overloaded = find_policy("adaptive", PolicySortOptions(policy="adaptive")).orders
    assert calm == order("fifo")
    assert busy.lapses
    assert ascend(overloaded.rank, ask(1.0, num_tokens=10), ask(0.0, num_tokens=1000))
    waited = ask(0.0, num_tokens=1000)  # ten times its own prefill of one second
    assert ascend(overloaded.rank, ask(9.9), waited, ask(10.1))


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
        assert registered.policy.__name__ == name
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
