"""power_of_two, weighted_round_robin and topology_aware against their definitions."""

from collections import Counter
from typing import Any

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.operators.route import RouteOptions, build
from sagellm.operators.routing.strategies import TopologyAware, WeightedRoundRobin, power_of_two
from sagellm.operators.routing.strategy import Candidates
from sagellm.operators.routing.view import ReplicaPool, RouterView
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Draw, Setup, Target
from sagellm.runtime.sampling import Sampling

POOL = ReplicaPool("p", 4, ("prefill",), ("prefill",))
ONE_ENGINE = Setup("route", (Target("generate", 3, "g", is_next=True),))
PAIRS = Setup("route", (Target("prefill", 2, "p", is_next=True), Target("decode", 3, "d")))


def ask(name: str = "r", num_tokens: int = 100, **fields: Any) -> Request:
    prompt, sampling = (1,) * num_tokens, Sampling(max_tokens=1)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields)


def candidates(view: RouterView, request: Request | None = None) -> Candidates:
    return Candidates(view.pools["p"], request or ask(), view.num_routed, name="p")


def loaded(view: RouterView, number: int, num_tokens: int) -> RouterView:
    return view.place(ask(f"{number}-{view.num_routed}", num_tokens - 1), (("p", number),))


class Drawn:
    """Gives the numbers of a list in place of random ones."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def below(self, bound: int) -> int:
        assert 0 <= self.numbers[0] < bound
        return self.numbers.pop(0)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ((0, 0), 0),  # 0 and 1
        ((1, 0), 2),  # 1 and 2
        ((2, 0), 2),  # 2 and 3
        ((3, 0), 0),  # 3 and 0
        ((3, 1), 1),  # 3 and 1
    ],
)
def test_the_less_loaded_of_two(drawn: tuple[int, int], expected: int) -> None:
    """Outstanding tokens are 20, 30, 10 and 40."""
    view = RouterView.of((POOL,))
    for number, num_tokens in enumerate((20, 30, 10, 40)):
        view = loaded(view, number, num_tokens)
    assert power_of_two(candidates(view), 0.0, Drawn(*drawn)) == expected  # type: ignore[arg-type]


def test_the_two_are_distinct_and_all_pairs_equally_likely() -> None:
    """Of four loads, the lowest wins half of the pairs, the next a third, the next a sixth."""
    view = RouterView.of((POOL,))
    for number in range(4):
        view = loaded(view, number, 10 + number)
    draws = (Draw(0, "route", number) for number in range(1200))
    counts = Counter(power_of_two(candidates(view), 0.0, draw) for draw in draws)
    assert counts[3] == 0
    assert [counts[number] for number in range(3)] == [
        pytest.approx(share, rel=0.15) for share in (600, 400, 200)
    ]


def test_of_one_candidate_there_is_no_second() -> None:
    view = RouterView.of((POOL,))
    for number in (0, 1, 3):
        view = view.mark(("p", number), is_up=False)
    assert power_of_two(candidates(view), 0.0, Draw(0, "route", 0)) == 2


def turns(weights: tuple[int, ...], views: list[RouterView]) -> list[int]:
    strategy = WeightedRoundRobin({"p": weights})
    state, chosen = strategy.initial, []
    for view in views:
        number, state = strategy.order(state, candidates(view), 0.0, Draw(0, "route", 0))
        chosen.append(number)
    return chosen


def pool_of(size: int, down: tuple[int, ...] = ()) -> RouterView:
    view = RouterView.of((ReplicaPool("p", size, ("prefill",), ("prefill",)),))
    for number in down:
        view = view.mark(("p", number), is_up=False)
    return view


def test_weights_are_spread_as_in_nginx() -> None:
    assert turns((5, 1, 1), [pool_of(3)] * 14) == [0, 0, 1, 0, 2, 0, 0] * 2
    assert turns((4, 2, 1), [pool_of(3)] * 7) == [0, 1, 0, 2, 0, 1, 0]
    assert turns((), [pool_of(3)] * 6) == [0, 1, 2] * 2


def test_a_replica_that_is_away_keeps_its_turn() -> None:
    """As in nginx: current weights 2, -1, -1 after the first turn, then only 0 and 2 take part."""
    views = [pool_of(3), pool_of(3, (1,)), pool_of(3, (1,)), pool_of(3)]
    assert turns((1, 1, 1), views) == plain_turns((1, 1, 1), views)


def plain_turns(weights: tuple[int, ...], views: list[RouterView]) -> list[int]:
    """nginx's loop over all candidates."""
    current, chosen = [0] * len(weights), []
    for view in views:
        numbers = candidates(view).numbers
        for number in numbers:
            current[number] += weights[number]
        best = max(numbers, key=lambda number: (current[number], -number))
        current[best] -= sum(weights[number] for number in numbers)
        chosen.append(best)
    return chosen


def test_turns_are_those_of_the_plain_loop_whoever_comes_and_goes() -> None:
    weights, draw = (7, 1, 3, 3, 2), Draw(0, "test", 0)
    views = [
        pool_of(5, tuple(number for number in range(4) if draw.random() < 0.3)) for _ in range(300)
    ]
    assert turns(weights, views) == plain_turns(weights, views)


def order(strategy: TopologyAware, view: RouterView, request: Request) -> Any:
    found, _ = strategy.order(strategy.initial, candidates(view, request), 0.0, Draw(0, "r", 0))
    return found


NEAR = TopologyAware({"p": ("r1/m1/a", "r1/m1/b", "r1/m2/a", "r2/m1/a")})


def test_the_nearest_of_idle_replicas_goes_first() -> None:
    asked = ask(tags={"place": "r1/m1/b"})
    assert order(NEAR, RouterView.of((POOL,)), asked) == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (1, [1, 0, 2, 3]),  # 1 + 1, 2, 10, 100
        (2, [0, 1, 2, 3]),
        (10, [0, 2, 1, 3]),
        (100, [0, 2, 3, 1]),
    ],
)
def test_affinity_and_load_are_summed_in_tokens(load: int, expected: list[int]) -> None:
    """A prompt of 100 tokens costs 1, 2, 10 and 100 more at the affinities 1, 0.5, 0.1, 0.01."""
    view = loaded(RouterView.of((POOL,)), 1, load)
    asked = ask(tags={"place": "r1/m1/b"})
    ranked = order(NEAR, view, asked)
    if load == 2:
        assert set(ranked[:2]) == {0, 1}  # equal replicas take turns
    else:
        assert ranked == expected


def test_a_place_may_be_a_rack_or_a_machine() -> None:
    view = RouterView.of((POOL,))
    assert order(NEAR, view, ask(tags={"place": "r2"}))[0] == 3
    assert set(order(NEAR, view, ask(tags={"place": "r1/m1"}))[:2]) == {0, 1}
    assert order(NEAR, view, ask(tags={"place": "elsewhere"})) == [0, 1, 2, 3]
    tagged = TopologyAware(NEAR.places, tag="home")
    assert order(tagged, view, ask(tags={"home": "r2/m1/a"}))[0] == 3


def test_without_a_place_the_load_decides() -> None:
    view = loaded(RouterView.of((POOL,)), 0, 50)
    assert order(NEAR, view, ask()) == 1
    assert order(TopologyAware(), view, ask(tags={"place": "r1"})) == 1


def test_decode_goes_to_where_the_prefill_is(running: Any) -> None:
    places = {"p": ["r1/m1", "r1/m2"], "d": ["r1/m2", "r2/m1", "r1/m1"]}
    router = running(build(RouteOptions("topology_aware", {"places": places}), PAIRS))
    pairs = []
    for number in range(6):
        (output,) = router(Arrival(ask(str(number))))
        placed, router.state = next(iter(output.choices))
        pairs.append((placed.placement["prefill"], placed.placement["decode"]))
    assert pairs[:2] == [(0, 2), (1, 0)]
    # A decode replica in another rack is taken once the near ones have 101 tokens.
    assert Counter(decode for _, decode in pairs) == {0: 2, 1: 2, 2: 2}


def test_a_large_rack_is_compared_in_part() -> None:
    pool = ReplicaPool("p", 200, ("prefill",), ("prefill",))
    strategy, view = TopologyAware({"p": ("r1",) * 200}), RouterView.of((pool,))
    state, seen = strategy.initial, set()
    for turn in range(20):
        asked = Candidates(view.pools["p"], ask(tags={"place": "r1"}), turn, name="p")
        ranked, _ = strategy.order(state, asked, 0.0, Draw(0, "r", 0))
        assert isinstance(ranked, list)
        assert len(ranked) <= 17
        seen |= set(ranked)
    assert seen == set(range(200))


@pytest.mark.parametrize(
    ("strategy", "options", "says"),
    [
        ("weighted_round_robin", {"weights": {"gg": [1]}}, "no replica of an engine `gg`"),
        ("weighted_round_robin", {"weights": {"g": [1.5]}}, "each an integer"),
        ("topology_aware", {"places": {"h": ["r1"]}}, "there are g"),
    ],
)
def test_wrong_weights_and_places_are_named(strategy: str, options: Any, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        build(RouteOptions(strategy, options), ONE_ENGINE)


@pytest.mark.parametrize(
    ("strategy", "options", "says"),
    [
        ("weighted_round_robin", {"weights": {"g": [1, 0]}}, "`weights` of `g` must be at least 1"),
        ("topology_aware", {"places": {"g": ["r1//x"]}}, "'r1//x' is not RACK/MACHINE/DOMAIN"),
        ("topology_aware", {"places": {"g": ["a/b/c/d"]}}, "'a/b/c/d' is not RACK/MACHINE/DOMAIN"),
    ],
)
def test_weights_and_places_out_of_range_are_refused(
    strategy: str, options: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        build(RouteOptions(strategy, options), ONE_ENGINE)
