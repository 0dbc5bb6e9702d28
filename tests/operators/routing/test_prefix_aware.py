"""prefix_aware against its definition: the least sum of outstanding and uncached tokens."""

from typing import Any

import pytest
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.routing.prefix_aware import PrefixAware, SentPrefixes
from sagellm.operators.routing.strategy import Candidates, Hold
from sagellm.operators.routing.view import ReplicaPool, RouterView
from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw
from sagellm.runtime.prefixes import Hasher, PrefixIndex, PromptHashes, hash_secret
from sagellm.runtime.sampling import Sampling

POOL = ReplicaPool("p", 3, ("prefill",), ("prefill",))
HASHER = Hasher(hash_secret())
PROMPT = tuple(range(101))
SIZE = 10


def ask(name: str = "r", num_tokens: int = 101, **fields: Any) -> Request:
    tokens = PROMPT[:num_tokens]
    sampling = Sampling(max_tokens=10)
    return Request(request_id=name, prompt_token_ids=tokens, sampling=sampling, **fields)


def warm(**held: int) -> RouterView:
    """A view in which replicas have so many tokens of the prompt cached: r1=40."""
    hashes, blocks = PromptHashes(PROMPT, "", SIZE, HASHER.key), dict[bytes, int]()
    for name, num_tokens in held.items():
        for index in range(num_tokens // SIZE):
            bit = 1 << int(name[1:])
            blocks[hashes[index]] = blocks.get(hashes[index], 0) | bit
    return RouterView.of((POOL,)).with_index("p", PrefixIndex(SIZE, Map(blocks)))


def order(view: RouterView, request: Request | None = None, **options: Any) -> list[Any]:
    asked = request or ask()
    candidates = Candidates(view.pools["p"], asked, view.num_routed, HASHER, forecast=view.forecast)
    found, _ = PrefixAware(**options).order(None, candidates, 0.0, Draw(0, "route", 0))
    return [found] if isinstance(found, int) else list(found)  # type: ignore[arg-type]


def loaded(view: RouterView, replica: int, num_requests: int, num_tokens: int = 11) -> RouterView:
    """The view with so many requests at a replica, of `num_tokens` prompt tokens and 10 more."""
    for number in range(num_requests):
        view = view.place(ask(f"{replica}-{number}", num_tokens), (("p", replica),))
    return view


def test_nobody_is_held_for_longer_than_the_prefix_takes_to_compute() -> None:
    view = full(warm(r1=80), 1)
    for _ in range(10):
        first = FirstToken(seconds=1.0, num_computed_tokens=100, computed_s=0.1)
        view = replace(view, forecast=view.forecast.after(first, 0.0))
    hold = order(view, max_hold_s=5.0)[0]
    assert hold == Hold(1, pytest.approx(0.08))
    candidates = Candidates(view.pools["p"], ask(), 0, HASHER, forecast=view.forecast)
    assert candidates.prefill_s(0) == pytest.approx(0.101)
    assert candidates.prefill_s(1) == pytest.approx(0.021)


def full(view: RouterView, replica: int) -> RouterView:
    return view.take_back(("p", replica), "", 0.0)


def test_the_longest_prefix_wins_among_equals() -> None:
    assert order(warm(r1=40, r2=80)) == [2, 1, 0]


def test_with_nothing_cached_the_load_decides() -> None:
    view = loaded(warm(), 0, 1)
    assert order(view)[0] == 1


def test_a_prefix_is_worth_as_many_outstanding_tokens_as_it_saves() -> None:
    assert order(loaded(warm(r1=80), 1, 3))[0] == 1  # 63 outstanding
    assert order(loaded(warm(r1=80), 1, 4))[0] != 1  # 84: no hot spot
    assert order(loaded(warm(r1=80), 1, 4), load_weight=0.5)[0] == 1


def test_a_replica_without_room_is_no_candidate() -> None:
    assert order(full(warm(r1=80, r2=10), 1)) == [2, 0]


def test_a_request_is_held_for_a_warm_replica_only_if_that_is_asked_for_and_saves_enough() -> None:
    view = full(warm(r1=80), 1)
    assert order(view)[0] != Hold(1, 0.5)
    assert order(view, max_hold_s=0.5) == [Hold(1, 0.5), 0]
    assert order(view, max_hold_s=0.5, min_saved=0.9) == [0]
    assert order(full(warm(r1=80, r2=60), 1), max_hold_s=0.5) == [2, 0]  # it saves 20 more
    lost = view.mark(("p", 1), is_up=False)
    assert order(lost, max_hold_s=0.5) == [0]


def test_tenants_do_not_meet() -> None:
    view = warm(r2=80)
    assert order(view, ask(salt="other"))[0] == 0
    assert order(view, ask())[0] == 2


@pytest.mark.parametrize("num_replicas", [40, 1000])
def test_a_decision_compares_a_few_however_many_have_the_prefix(num_replicas: int) -> None:
    pool = ReplicaPool("p", num_replicas, ("prefill",))
    hashes = PromptHashes(PROMPT, "", SIZE, HASHER.key)
    everywhere = PrefixIndex(SIZE, Map({hashes[0]: (1 << num_replicas) - 1}))
    view = RouterView.of((pool,)).with_index("p", everywhere)
    seen = set()
    for turn in range(0, num_replicas, 10):
        candidates = Candidates(view.pools["p"], ask(), turn, HASHER)
        found, _ = PrefixAware().order(None, candidates, 0.0, Draw(0, "route", 0))
        assert isinstance(found, list)
        assert len(found) <= 17
        seen |= set(found)
    assert seen == set(range(num_replicas))


def test_candidates_say_what_is_cached_where() -> None:
    view = loaded(warm(r0=20), 1, 2)
    candidates = Candidates(view.pools["p"], ask(), 0, HASHER)
    assert [candidates.num_cached_tokens(number) for number in (0, 1)] == [20, 0]
    assert [candidates.num_uncached_tokens(number) for number in (0, 1)] == [81, 101]
    assert [candidates.num_pending_tokens(number) for number in (0, 1)] == [0, 22]
    assert [candidates.num_requests(number) for number in (0, 1)] == [0, 2]


BLIND = RouterView.of((POOL,))  # engines have reported no prefix blocks


def follow(requests: list[Request], view: RouterView = BLIND, **options: Any) -> list[int]:
    """The replica of each request. All requests stay at their replicas."""
    strategy, chosen = PrefixAware(**options), []
    state: Any = strategy.initial
    for request in requests:
        candidates = Candidates(view.pools["p"], request, view.num_routed, HASHER)
        number, state = strategy.order(state, candidates, 0.0, Draw(0, "route", 0))
        assert isinstance(number, int)
        view = view.place(request, (("p", number),))
        chosen.append(number)
    return chosen


def chat(name: str, begin: int, num_tokens: int = 96, **fields: Any) -> Request:
    prompt = tuple(range(begin, begin + num_tokens))
    return Request(request_id=name, prompt_token_ids=prompt, **fields)


def test_without_reports_a_prompt_goes_to_where_its_prefix_was_sent() -> None:
    turns = [chat(f"{turn}-{begin}", begin) for turn in range(3) for begin in (0, 500, 900)]
    assert follow(turns) == [0, 1, 2] * 3


def test_a_prefix_of_a_small_share_is_not_followed() -> None:
    """Of 96 tokens, the last block is left out: 80 can be cached."""
    first = chat("a", 0)
    for num_tokens, share in ((250, 0.32), (330, 0.24)):
        longer = Request(request_id="b", prompt_token_ids=(*range(80), *[7] * (num_tokens - 80)))
        assert (follow([first, longer])[1] == 0) == (share > 0.3)
        assert (follow([first, longer], cache_threshold=0.2)[1] == 0) == (share > 0.2)


def test_an_overloaded_replica_is_not_followed() -> None:
    """With over 4 requests more than the idlest replica, and over 1.5 times as many."""
    chosen = follow([chat(str(number), 0) for number in range(12)], balance_abs_threshold=4)
    assert chosen[:5] == [0] * 5
    assert 0 not in chosen[5:7]
    busy = BLIND
    for number in range(60):
        busy = busy.place(chat(f"b{number}", 2000 + 200 * number), (("p", number % 3),))
    assert follow([chat(str(n), 0) for n in range(9)], busy, balance_abs_threshold=4) == [0] * 9


def test_reports_replace_the_estimate() -> None:
    strategy, request = PrefixAware(), ask()
    blind = Candidates(BLIND.pools["p"], request, 0, HASHER)
    number, state = strategy.order(None, blind, 0.0, Draw(0, "route", 0))
    assert number == 0
    assert state is not None
    seen = Candidates(warm(r2=80).pools["p"], request, 0, HASHER)
    found, state = strategy.order(state, seen, 0.0, Draw(0, "route", 0))
    assert isinstance(found, list)
    assert (found[0], state) == (2, None)


def test_decode_is_not_chosen_by_an_estimate() -> None:
    """Its blocks come from the prefill replica, wherever the prompt was decoded before."""
    state: Any = SentPrefixes.of(16).sent(chat("a", 0), HASHER, 2, 100)
    pool, asked = BLIND.pools["p"], chat("b", 0)
    first = Candidates(pool, asked, 0, HASHER, chosen={})
    assert PrefixAware().order(state, first, 0.0, Draw(0, "route", 0))[0] == 2
    second = Candidates(pool, asked, 0, HASHER, chosen={"prefill": 2})
    assert PrefixAware().order(state, second, 0.0, Draw(0, "route", 0)) == (0, None)


def test_estimates_of_tenants_do_not_mix() -> None:
    assert follow([chat("a", 0), chat("b", 0, salt="other"), chat("c", 0)]) == [0, 1, 0]


def test_a_text_is_followed_as_tokens_are() -> None:
    one = [Request(request_id=f"a{n}", prompt="once upon a time " * 20) for n in range(2)]
    other = [Request(request_id=f"b{n}", prompt="in the beginning " * 20) for n in range(2)]
    assert follow([one[0], other[0], one[1], other[1]]) == [0, 1, 0, 1]
    messages = [({"role": "user", "content": f"{n} " * 100},) for n in range(2)]
    chats = [Request(request_id=str(n), messages=messages[n % 2]) for n in range(4)]
    assert follow(chats) == [0, 1, 0, 1]


@pytest.mark.parametrize("max_blocks", [2, 20, 64])
def test_an_estimate_is_bounded_and_forgets_the_oldest(max_blocks: int) -> None:
    sent = SentPrefixes.of(SIZE)
    for number in range(50):
        sent = sent.sent(chat(str(number), 1000 * number), HASHER, number % 3, max_blocks)
        assert len(sent.young.blocks) + len(sent.old.blocks) <= max_blocks
    assert not sent.cached(chat("x", 0), HASHER).levels
    assert sent.cached(chat("x", 49_000), HASHER).levels[0][1] == 1 << 49 % 3


def test_a_block_that_is_sent_again_is_kept() -> None:
    sent = SentPrefixes.of(SIZE)
    for number in range(50):
        sent = sent.sent(chat("hot", 0), HASHER, 1, 40)
        sent = sent.sent(chat(str(number), 1000 * number), HASHER, 0, 40)
        assert sent.cached(chat("hot", 0), HASHER).num_tokens(1) == 90


def test_both_generations_of_an_estimate_count() -> None:
    """Replica 0 got a long prompt before, and both got a shorter one now."""
    sent = SentPrefixes.of(SIZE).sent(chat("a", 0), HASHER, 0, 1000)
    old = SentPrefixes(SentPrefixes.of(SIZE).young, sent.young)
    both = old.sent(chat("b", 0, 51), HASHER, 1, 1000).sent(chat("c", 0, 51), HASHER, 0, 1000)
    assert both.cached(chat("d", 0), HASHER).levels == ((90, 0b1), (50, 0b10))
