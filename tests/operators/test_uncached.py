"""Operators before a router count the tokens of a prompt that must be computed, not its length."""

from typing import Any

import pytest
from immutables import Map
from msgspec.structs import replace

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.operators import admission, pd_split, policy_sort, route
from sagellm.runtime.feedback import Backlog, FirstToken, PrefixesChanged, QueueChanged
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Emit, Setup, Target, Terminate
from sagellm.runtime.plan import plan
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import Hasher, PrefixIndex, PromptHashes, hash_secret
from sagellm.runtime.sampling import Sampling

HASHER = Hasher(hash_secret())
SIZE = 10
PROMPT = tuple(range(101))
APART, AGGREGATED = frozenset({"disaggregated"}), frozenset({"aggregated"})
TARGETS = (
    Target("prefill", 2, "p", True, APART),
    Target("decode", 2, "d", False, APART),
    Target("generate", 2, "d", True, AGGREGATED),
)
SETUP = Setup("it", TARGETS, hasher=HASHER)


def ask(name: str = "r", tokens: tuple[int, ...] = PROMPT, **fields: Any) -> Request:
    sampling = Sampling(max_tokens=9)
    return Request(request_id=name, prompt_token_ids=tokens, sampling=sampling, **fields)


def has(engine: str, num_tokens: int, mask: int = 0b10) -> PrefixesChanged:
    """Feedback: replicas of an engine have so many tokens of the prompt cached."""
    hashes = PromptHashes(PROMPT, "", SIZE, HASHER.key)
    blocks = {hashes[index]: mask for index in range(num_tokens // SIZE)}
    return PrefixesChanged(engine, PrefixIndex(SIZE, Map(blocks)))


# ---- pd_split ----------------------------------------------------------------------------------


def way(split: Any, request: Request | None = None) -> tuple[str, int]:
    (emit,) = split(Arrival(request or ask()))
    assert isinstance(emit, Emit)
    assert isinstance(emit.item, Request)
    return emit.outlet, emit.item.num_cached_tokens


def test_a_prompt_that_is_cached_at_the_aggregated_engine_goes_there(running: Any) -> None:
    split = running(pd_split.build(pd_split.PDSplitOptions(min_uncached_tokens=32), SETUP))
    assert way(split) == ("disaggregated", 0)
    split(has("d", 60))
    assert way(split) == ("disaggregated", 0)
    split(has("d", 70))
    assert way(split) == ("aggregated", 70)
    assert way(split, ask(salt="other")) == ("disaggregated", 0)


def test_what_the_prefill_engine_has_parts_nothing_and_is_told_on_that_way(running: Any) -> None:
    split = running(pd_split.build(pd_split.PDSplitOptions(min_uncached_tokens=32), SETUP))
    split(has("p", 100))
    assert way(split) == ("disaggregated", 100)


def test_it_asks_for_prefix_blocks_only_where_they_may_change_a_decision() -> None:
    assert "cache" in pd_split.build(pd_split.PDSplitOptions(), SETUP).subscribes
    assert (
        "cache"
        not in pd_split.build(pd_split.PDSplitOptions(min_uncached_tokens=0), SETUP).subscribes
    )
    apart = Setup("it", TARGETS[:2])
    assert "cache" not in pd_split.build(pd_split.PDSplitOptions(), apart).subscribes


# ---- admission ---------------------------------------------------------------------------------


def refused(door: Any, request: Request) -> str:
    (output,) = door(Arrival(request), 1.0)
    return output.event.code if isinstance(output, Terminate) else ""


def test_a_cached_prompt_is_admitted_where_another_is_one_too_many(running: Any) -> None:
    options = admission.AdmissionOptions(max_queued_tokens=100)
    door = running(admission.build(options, SETUP))
    door(QueueChanged(node="sort", backlog=Backlog(num_requests=1, num_tokens=20)))
    assert refused(door, ask("a", priority=0)) == "queue_full"  # 101 + 9 + 20
    door(has("p", 100))
    assert refused(door, ask("b", priority=0)) == ""
    assert refused(door, ask("c", PROMPT[1:], priority=0)) == "queue_full"


def test_a_cached_prompt_is_predicted_to_be_sooner(running: Any) -> None:
    """Prefills of 10 and 100 tokens took 0.1 and 1 s; predictions follow."""
    door = running(admission.build(admission.AdmissionOptions(slo_ttft_s=1.0), SETUP))
    for number in range(20):
        num_tokens = 100 if number % 2 else 10
        computed_s = num_tokens / 100
        first = FirstToken(
            seconds=computed_s, num_computed_tokens=num_tokens, computed_s=computed_s
        )
        door(first, number)
    for num_served in range(1, 20):
        waiting = Backlog(1, 20, 10, num_served=num_served, num_served_tokens=100 * num_served)
        door(QueueChanged(node="sort", backlog=replace(waiting, busy_s=num_served * 0.1)), 1.0)
    request = ask(stamps=Stamps(arrived_s=1.0), priority=0)
    assert refused(door, request) == "slo_unreachable"
    door(has("d", 60))
    assert refused(door, replace(request, request_id="again")) == ""


def test_the_request_says_what_is_cached(running: Any) -> None:
    door = running(admission.build(admission.AdmissionOptions(), SETUP))
    door(has("p", 20))
    door(has("d", 40))
    (emit,) = door(Arrival(ask()))
    assert emit.item.num_cached_tokens == 40
    (emit,) = door(Arrival(ask("r2", salt="other", num_cached_tokens=7)))
    assert emit.item.num_cached_tokens == 0


def test_a_model_is_not_taken_for_another(running: Any) -> None:
    models = {"small": ("p",), "large": ("d",)}
    setup = Setup("it", TARGETS, hasher=HASHER, models=models)
    door = running(admission.build(admission.AdmissionOptions(), setup))
    door(has("p", 20))
    door(has("d", 40))
    for model, cached in (("small", 20), ("large", 40), ("", 20)):
        (emit,) = door(Arrival(ask(model or "none", model=model)))
        assert emit.item.num_cached_tokens == cached


def test_admission_asks_only_where_it_counts_tokens_or_predicts() -> None:
    asks = [
        "cache" in admission.build(options, SETUP).subscribes
        for options in (
            admission.AdmissionOptions(),
            admission.AdmissionOptions(max_queued_tokens=10),
            admission.AdmissionOptions(slo_ttft_s=1.0),
        )
    ]
    assert asks == [False, True, True]


# ---- policy_sort -------------------------------------------------------------------------------


def sorted_names(sort: Any, *requests: Request) -> list[str]:
    for request in requests:
        sort(Arrival(request))
    return [entry[3].request_id for entry in sort.state.entries]


def late(name: str, tokens: tuple[int, ...]) -> Request:
    return ask(name, tokens, slo_ttft_s=10.0)


def test_slack_counts_what_is_to_be_computed(running: Any) -> None:
    """The shorter prompt has more slack, until the longer one is cached."""
    options = policy_sort.PolicySortOptions(policy="slo_aware", prefill_tokens_per_s=20.0)
    longer, shorter = late("longer", PROMPT), late("shorter", PROMPT[1:60])
    sort = running(policy_sort.build(options, SETUP))
    assert sorted_names(sort, shorter, longer) == ["longer", "shorter"]
    assert sort.state.backlog.num_prompt_tokens == 160
    sort = running(policy_sort.build(options, SETUP))
    sort(has("d", 100))
    assert sorted_names(sort, shorter, longer) == ["shorter", "longer"]
    assert sort.state.backlog.num_prompt_tokens == 60


def test_prefill_times_are_learned_unless_they_are_given(running: Any) -> None:
    """At 1000 tokens a second the earlier deadline is first; at 10 the longer prompt must be."""
    sort = running(policy_sort.build(policy_sort.PolicySortOptions(policy="slo_aware"), SETUP))
    first, longer = late("first", PROMPT[:20]), replace(late("longer", PROMPT), slo_ttft_s=11.0)
    assert sorted_names(sort, first, longer) == ["first", "longer"]
    for _ in range(10):
        sort(FirstToken(seconds=9.0, num_computed_tokens=50, computed_s=5.0))
    again = [replace(one, request_id=f"{one.request_id}-2") for one in (first, longer)]
    assert sorted_names(sort, *again)[-3:] == ["first-2", "first", "longer"]


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({"policy": "fifo"}, False),
        ({"policy": "slo_aware"}, True),
        ({"policy": "slo_aware", "prefill_tokens_per_s": 10.0}, False),
    ],
)
def test_first_tokens_are_listened_to_only_where_ranks_use_them(options: Any, learns: bool) -> None:
    sort: Any = policy_sort.build(policy_sort.PolicySortOptions(**options), SETUP)
    assert ("first_token" in sort.subscribes) == learns
    assert "cache" not in sort.subscribes


# ---- route -------------------------------------------------------------------------------------


def test_a_routed_request_says_what_its_own_replica_has(running: Any) -> None:
    """For any strategy. Upstream the request counted with the most that any replica has."""
    setup = Setup("route", TARGETS[:1], hasher=HASHER)
    router = running(route.build(route.RouteOptions("round_robin"), setup))
    router(has("p", 60, mask=0b10))
    cached = {}
    for number in range(2):
        (output,) = router(Arrival(ask(str(number), num_cached_tokens=60)))
        placed, router.state = next(iter(output.choices))
        cached[placed.placement["prefill"]] = placed.num_cached_tokens
    assert cached == {0: 0, 1: 60}


# ---- who asks ----------------------------------------------------------------------------------

FACTS = EngineFacts("m", 256, 4, block_size=4, num_blocks=64)


@pytest.mark.parametrize(
    ("door", "asked"), [(ops.admission(), False), (ops.admission(max_queued_tokens=99), True)]
)
def test_engines_report_where_an_operator_asks_and_then_all_are_told(
    door: Any, asked: bool
) -> None:
    graph = Graph("g").engine("g", model="null", device="null", replicas=2)
    graph >> door >> ops.policy_sort("slo_aware") >> ops.route() >> ops.generate(engine="g")
    made = plan(graph.ir, RESOLVER, {"g": 2}, facts={"g": FACTS})
    assert made.reads_cache("g") == asked
    assert set(made.cache_readers("g")) == {"admission", "policy_sort", "route"}
