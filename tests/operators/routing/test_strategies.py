"""Each strategy against the definition in its docstring."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sagellm.operators.routing import STRATEGIES, find_strategy
from sagellm.operators.routing.strategies import choose_by_key
from sagellm.operators.routing.strategy import Candidates, make_strategy
from sagellm.operators.routing.view import ReplicaPool, RouterView
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw

POOL = ReplicaPool("p", 4, ("prefill",))


def choose(strategy: str, view: RouterView, request: Any, number: int, **options: Any) -> Any:
    candidates = Candidates(view.pools["p"], request, view.num_routed)
    made: Any = make_strategy(STRATEGIES[strategy], strategy, options, ())
    draw = Draw(0, "route", number)
    if hasattr(made, "order"):
        order, _ = made.order(made.initial, candidates, 0.0, draw)
        return order if isinstance(order, int) else order[0]
    return made(candidates, 0.0, draw)


def choices(strategy: str, requests: Any, **options: Any) -> Any:
    """The replica of each request, with each request placed before the next."""
    view, chosen = RouterView.of((POOL,)), []
    for number, request in enumerate(requests):
        replica = choose(strategy, view, request, number, **options)
        view = view.place(request, (("p", replica),))
        chosen.append(replica)
    return chosen


def ask(number: int, **fields: Any) -> Any:
    return Request(request_id=str(number), prompt_token_ids=(1,), **fields)


def test_round_robin_takes_turns() -> None:
    assert choices("round_robin", map(ask, range(6))) == [0, 1, 2, 3, 0, 1]


def test_load_balanced_fills_an_idle_pool_evenly() -> None:
    assert choices("load_balanced", map(ask, range(8))) == [0, 1, 2, 3] * 2


def test_random_is_uniform_and_follows_the_seed() -> None:
    chosen = choices("random", map(ask, range(400)))
    assert all(70 < count < 130 for count in Counter(chosen).values())
    assert chosen == choices("random", map(ask, range(400)))


def test_affinity_keeps_a_user_in_one_place() -> None:
    requests = [ask(number, user_id=str(number % 50)) for number in range(100)]
    chosen = choices("affinity", requests)
    assert chosen[:50] == chosen[50:]
    assert set(chosen) == {0, 1, 2, 3}


def test_affinity_prefers_the_key_to_the_user() -> None:
    requests = [ask(n, user_id=str(n), tags={"key": "same"}) for n in range(9)]
    assert len(set(choices("affinity", requests))) == 1


def test_locality_tells_models_and_users_apart() -> None:
    one = [ask(n, model="m", user_id="u") for n in range(9)]
    many = [ask(n, model=f"m{n}", user_id="u") for n in range(50)]
    assert len(set(choices("locality", one))) == 1
    assert len(set(choices("locality", many))) == 4


@pytest.mark.parametrize("strategy", ["affinity", "locality"])
def test_a_bound_keeps_a_hot_key_from_filling_one_replica(strategy: str) -> None:
    hot = [ask(number, model="m", user_id="u") for number in range(40)]
    assert len(set(choices(strategy, hot))) == 1
    counts = Counter(choices(strategy, hot, load_factor=1.25))
    assert max(counts.values()) == 13  # of a mean of 10
    first = choices(strategy, hot[:1])
    assert choices(strategy, hot[:1], load_factor=1.25) == first
    assert counts[first[0]] == 13


@pytest.mark.parametrize("strategy", ["affinity", "locality"])
def test_without_a_key_the_load_decides(strategy: str) -> None:
    assert choices(strategy, map(ask, range(4))) == [0, 1, 2, 3]


def test_a_new_replica_takes_its_share_and_moves_no_other_key() -> None:
    keys = [f"user-{number}" for number in range(1000)]
    moved = [key for key in keys if choose_by_key(key, range(4)) != choose_by_key(key, range(5))]
    assert all(choose_by_key(key, range(5)) == 4 for key in moved)
    assert 150 < len(moved) < 250


def test_the_hash_is_the_same_in_every_process() -> None:
    assert [choose_by_key(key, range(8)) for key in ("", "a", "b", "user")] == [2, 6, 7, 1]


def test_the_table_names_each_strategy() -> None:
    for name, strategy in STRATEGIES.items():
        assert strategy.__name__.lower() in (name, name.replace("_", ""))
        assert strategy.__doc__


def test_the_docs_name_the_strategies_of_the_table() -> None:
    docs = (Path(__file__).parents[3] / "docs" / "graphs.md").read_text()
    (row,) = (line for line in docs.splitlines() if line.startswith("| `route` |"))
    assert re.findall(r"`(\w+)`", row.split("`strategy`: ")[1].split(";")[0]) == [*STRATEGIES.ours]


@pytest.mark.parametrize(("name", "hint"), [("locallity", "did you mean locality"), ("?", "known")])
def test_an_unknown_strategy_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        find_strategy(name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_chooses_a_replica_whose_engine_is_lost(strategy: str) -> None:
    view = RouterView.of((POOL,)).mark(("p", 1), is_up=False).mark(("p", 2), is_up=False)
    chosen = set()
    for number in range(100):
        request = ask(number, user_id=str(number), model="m")
        chosen.add(choose(strategy, view, request, number))
        view = view.place(request, ())
    assert chosen <= {0, 3}
    assert view.mark(("p", 1), is_up=True).pools["p"].up == 0b1011


def test_where_every_engine_is_lost_a_request_is_placed_and_waits() -> None:
    view = RouterView.of((POOL,))
    for number in range(4):
        view = view.mark(("p", number), is_up=False)
    assert Candidates(view.pools["p"], ask(0), 0).numbers == (0, 1, 2, 3)


def test_a_lost_replica_moves_its_own_keys_only() -> None:
    before = {key: choose_by_key(key, range(4)) for key in map(str, range(200))}
    after = {key: choose_by_key(key, (0, 2, 3)) for key in before}
    assert all(after[key] == before[key] for key in before if before[key] != 1)
