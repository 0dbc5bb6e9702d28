"""The longest cached prefix goes first, and a new prefix is computed once."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from immutables import Map

from sagellm.operators import policy_sort
from sagellm.operators.policies.order import PolicySortOptions
from sagellm.runtime.feedback import CreditChanged, PrefixesChanged
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Offer, OfferTaken, Setup, Signal, Target
from sagellm.runtime.prefixes import Hasher, PrefixIndex, PromptHashes, hash_secret

HASHER = Hasher(hash_secret())
SETUP = Setup("sort", (Target("generate", 1, "g", True),), hasher=HASHER)
SIZE = 16
CREDIT = CreditChanged(node="generate", num_left=1.0)


def ask(name: str, at: float, prefix: int, num_shared: int, length: int = 200) -> Request:
    """A prompt whose first `num_shared` tokens are those of the prefix."""
    own = 1000 + int(name.encode().hex(), 16) % 10_000
    ids = (prefix,) * num_shared + (own,) * (length - num_shared)
    return Request(request_id=name, prompt_token_ids=ids, stamps=Stamps(arrived_s=at))


def cached(*prompts: tuple[int, int]) -> PrefixesChanged:
    """So many tokens of each prefix are cached."""
    blocks = {}
    for prefix, num_tokens in prompts:
        hashes = PromptHashes((prefix,) * (num_tokens + 1), "", SIZE, HASHER.key)
        blocks.update({hashes[index]: 1 for index in range(num_tokens // SIZE)})
    return PrefixesChanged("g", PrefixIndex(SIZE, Map(blocks)))


@pytest.fixture
def sort(running: Any) -> Any:
    return lpm(running)


def lpm(running: Any, window: int = 2, **policy_options: Any) -> Any:
    options = PolicySortOptions(
        "longest_prefix_match", window=window, policy_options=policy_options
    )
    return running(policy_sort.build(options, SETUP))


def offered(outputs: Any) -> list[str]:
    return [
        item.request_id for output in outputs if isinstance(output, Offer) for item in output.items
    ]


def take(sort: Any) -> str:
    """The request that an engine with room takes."""
    (offer,) = [output for output in sort(CREDIT) if isinstance(output, Offer)]
    sort(OfferTaken(offer.items[0]))
    return str(offer.items[0].request_id)


def drained(sort: Any) -> list[str]:
    return [take(sort) for _ in range(len(sort.state.entries))]


def test_most_cached_tokens_go_first_then_arrival(sort: Any) -> None:
    sort(cached((1, 160), (2, 64)))
    for request in (ask("a", 0, 3, 99), ask("b", 1, 2, 99), ask("c", 2, 1, 190), ask("d", 3, 4, 9)):
        sort(Arrival(request))
    assert drained(sort) == ["c", "b", "a", "d"]


def test_one_of_those_that_begin_alike_goes_before_all_others_then_the_rest(sort: Any) -> None:
    for n in range(3):
        sort(Arrival(ask(f"x{n}", n, 1, 100)))
    sort(Arrival(ask("y", 3, 2, 100)))
    assert take(sort) == "x0"
    assert offered(sort(CREDIT)) == ["x1", "y"]  # x1 leads now, and x2 waits for it
    sort(cached((1, 96)))  # what x0 computed
    assert drained(sort) == ["x1", "x2", "y"]


def test_a_family_comes_to_the_head_when_its_prefix_is_cached(sort: Any) -> None:
    sort(Arrival(ask("x0", 0, 1, 100)))
    for n in range(6):
        sort(Arrival(ask(f"y{n}", 1, 10 + n, 100)))
    sort(Arrival(ask("x1", 2, 1, 100)))
    sort(Arrival(ask("x2", 3, 1, 100)))  # both are far behind the window
    assert take(sort) == "x0"
    sort(cached((1, 96)))
    assert [take(sort), take(sort)] == ["x1", "x2"]


def test_a_prefix_that_something_else_computed_brings_the_whole_family(sort: Any) -> None:
    sort(Arrival(ask("x0", 0, 1, 100)))
    for n in range(6):
        sort(Arrival(ask(f"y{n}", 1, 10 + n, 100)))
    sort(Arrival(ask("x1", 2, 1, 100)))
    assert offered(sort(CREDIT)) == ["x0", "y0"]
    sort(cached((1, 96)))
    assert offered(sort(CREDIT)) == ["x0", "x1"]


def test_who_takes_the_lead_counts_with_what_is_cached_now(running: Any) -> None:
    sort = lpm(running, window=4)
    sort(Arrival(ask("y", 0, 2, 100)))
    sort(cached((1, 16)))
    sort(Arrival(ask("x0", 1, 1, 100)))
    sort(Arrival(ask("x1", 2, 1, 100)))
    sort(cached((3, 16)))
    assert offered(sort(CREDIT)) == ["y", "x0", "x1"]
    sort(Signal("cancel", "x0"))
    assert offered(sort(CREDIT)) == ["y", "x1"]


def test_32_tokens_are_the_threshold_of_both(sort: Any) -> None:
    for name, prefix, shared in (("a", 1, 31), ("b", 1, 31), ("c", 2, 32), ("d", 2, 32)):
        sort(Arrival(ask(name, 0, prefix, shared)))
    sort(Arrival(ask("e", 1, 3, 100)))
    assert drained(sort) == ["a", "b", "c", "d", "e"]  # d leads once c was sent
    sort(cached((4, 32), (5, 48)))
    for name, prefix in (("f", 4), ("g", 4), ("h", 5), ("i", 5), ("j", 6)):
        sort(Arrival(ask(name, 2, prefix, 100)))
    assert offered(sort(CREDIT)) == ["h", "i"]
    assert [entry[3].request_id for *_, entry in sort.state.context.state.matches] == [
        "h", "i", "f", "j", "g",
    ]  # fmt: skip


def test_what_was_evicted_counts_no_more(sort: Any) -> None:
    sort(cached((1, 160)))
    sort(Arrival(ask("b", 1, 1, 180)))
    sort(Arrival(ask("a", 0, 2, 180)))
    assert offered(sort(CREDIT)) == ["b", "a"]
    sort(cached((2, 64)))
    assert offered(sort(CREDIT)) == ["a", "b"]


def test_the_next_leads_when_the_first_is_cancelled(sort: Any) -> None:
    for n in range(3):
        sort(Arrival(ask(f"x{n}", n, 1, 100)))
    sort(Arrival(ask("y", 3, 2, 100)))
    sort(Signal("cancel", "x0"))
    assert offered(sort(CREDIT)) == ["x1", "y"]


def test_a_request_that_comes_again_takes_the_lead(sort: Any) -> None:
    sort(Arrival(ask("x1", 1, 1, 100)))
    sort(Arrival(ask("y", 2, 2, 100)))
    sort(Arrival(ask("x0", 0, 1, 100)))
    assert drained(sort) == ["x0", "x1", "y"]


def test_a_long_queue_is_fifo(running: Any) -> None:
    sort = lpm(running, fcfs_above=3)
    sort(cached((1, 160)))
    for name, at, prefix in (("a", 0, 2), ("b", 1, 3), ("c", 2, 4), ("d", 3, 1)):
        sort(Arrival(ask(name, at, prefix, 180)))
    assert drained(sort) == ["a", "d", "b", "c"]


def test_tenants_and_models_have_no_prefix_in_common(sort: Any) -> None:
    base = ask("a", 0, 1, 100)
    for fields in ({}, {"salt": "s"}, {"model": "m"}):
        name = "a" + "".join(fields)
        sort(Arrival(Request(request_id=name, prompt_token_ids=base.prompt_token_ids, **fields)))
    assert all(key == 0 for key, *_ in sort.state.context.state.matches)


def test_engines_report_their_prefix_blocks_for_it_alone() -> None:
    for policy, asked in (("longest_prefix_match", True), ("fair", False), ("least_slack", False)):
        built: Any = policy_sort.build(PolicySortOptions(policy), SETUP)
        assert ("cache" in built.subscribes) == asked


def sglang(waiting: list[Request], num_cached: Any) -> list[str]:
    """The order of schedule_policy.py, computed anew."""
    leaders: set[tuple[int, ...]] = set()
    keys: list[tuple[float, float, str]] = []
    for request in waiting:  # by arrival
        match, begin = num_cached(request), request.prompt_token_ids[:32]
        key = -float(match)
        if match <= 32:
            key = float("inf") if begin in leaders else key
            leaders.add(begin)
        keys.append((key, request.stamps.arrived_s, request.request_id))
    return [name for _, _, name in sorted(keys)]


EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "take", "cancel", "cache"]), st.integers(0, 3),
              st.integers(0, 6)),
    max_size=40,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(EVENTS)
def test_it_is_the_order_of_sglang_for_any_events(running: Any, events: Any) -> None:
    """With a window over the whole queue, all matches are current."""
    sort = lpm(running, window=64)
    waiting: list[Request] = []
    for number, (kind, prefix, blocks) in enumerate(events):
        if kind == "arrive":
            request = ask(f"r{number}", number, prefix, 16 * blocks)
            waiting.append(request)
            sort(Arrival(request))
        elif kind == "cache":
            changed = cached((prefix, 16 * blocks))
            sort(changed)
        elif waiting:
            expected = sglang(waiting, lambda one: num_cached(sort, one))
            name = take(sort) if kind == "take" else waiting[blocks % len(waiting)].request_id
            assert kind == "cancel" or name == expected[0]
            sort(Signal("cancel", name))
            waiting = [one for one in waiting if one.request_id != name]
    if waiting:
        assert offered(sort(CREDIT)) == sglang(waiting, lambda one: num_cached(sort, one))


def num_cached(sort: Any, request: Request) -> int:
    return int(
        sort.operator.lookup.looked_up(request, sort.state.context.indexes).num_cached_tokens
    )
