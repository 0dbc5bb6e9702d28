"""Indexes of reported prefix blocks: ordered, resynchronised, bounded."""

from dataclasses import replace
from typing import Any

import pytest

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.runtime.core import prefix_indexes
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Effect, QueryCache
from sagellm.runtime.core.events import CacheReported, Opened, ReplicaMarked, TimeCame
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Credit
from sagellm.runtime.plan import Plan, plan
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import HASH_BYTES, CacheChanged, Hasher, hash_secret

FACTS = EngineFacts("m", 256, 4, block_size=4, num_blocks=64)


def made(strategy: str = "prefix_aware") -> Plan:
    graph = Graph("g").engine("g", model="null", device="null", replicas=2)
    graph >> ops.route(strategy) >> ops.generate(engine="g")
    return plan(graph.ir, RESOLVER, {"g": 2}, facts={"g": FACTS})


def opened(ready: Plan | None = None) -> Core:
    core = Core(ready or made())
    for replica in (0, 1):
        effects = core.on(Opened("generate", replica, Credit(requests=4), 4), 0.0)
        assert asked(effects) == [replica]
    return core


def asked(effects: list[Effect]) -> list[int]:
    return [effect.replica for effect in effects if isinstance(effect, QueryCache)]


def block(number: int) -> bytes:
    return number.to_bytes(HASH_BYTES, "big")


def report(core: Core, replica: int, sequence: int, **fields: Any) -> list[Effect]:
    for name in ("stored", "dropped"):
        fields[name] = b"".join(map(block, fields.get(name, ())))
    changed = CacheChanged(engine="g", replica=replica, sequence=sequence, **{"epoch": 1, **fields})
    return core.on(CacheReported(changed), 1.0)


def known(core: Core) -> dict[int, int]:
    """Block -> mask of replicas."""
    blocks = core.prefixes.indexes["g"].blocks
    assert core.prefixes.num_blocks == len(blocks)
    return {int.from_bytes(name, "big"): mask for name, mask in blocks.items()}


def test_reports_add_up() -> None:
    core = opened()
    report(core, 0, 1, is_first=True, stored=(1, 2))
    report(core, 1, 1, is_first=True, stored=(2, 3))
    report(core, 0, 2, stored=(4,), dropped=(1, 9))
    assert known(core) == {2: 0b11, 3: 0b10, 4: 0b01}
    assert [core.prefixes.num_blocks_of("g", replica) for replica in (0, 1)] == [2, 2]
    assert core.logic_graph.cells["route"].state.pools["g"].index is core.prefixes.indexes["g"]


def test_a_gap_asks_for_all_and_until_then_nothing_counts() -> None:
    core = opened()
    report(core, 0, 1, is_first=True, stored=(1, 2))
    assert asked(report(core, 0, 3, stored=(3,))) == [0]
    assert known(core) == {}
    assert asked(report(core, 0, 4, stored=(4,))) == []
    report(core, 0, 1, is_first=True, stored=(5,))
    report(core, 0, 2, stored=(6,))
    assert known(core) == {5: 1, 6: 1}


def test_a_report_of_another_life_is_a_gap() -> None:
    core = opened()
    report(core, 0, 1, is_first=True, stored=(1,))
    assert asked(report(core, 0, 2, epoch=2, stored=(2,))) == [0]
    assert known(core) == {}


def test_a_lost_replica_has_nothing_and_is_asked_when_it_is_back() -> None:
    core = opened()
    report(core, 0, 1, is_first=True, stored=(1,))
    report(core, 1, 1, is_first=True, stored=(1, 2))
    core.on(ReplicaMarked("g", 1, is_up=False), 2.0)
    assert known(core) == {1: 0b01}
    report(core, 1, 2, stored=(3,))  # of an epoch that has ended
    assert known(core) == {1: 0b01}
    assert asked(core.on(ReplicaMarked("g", 1, is_up=True), 3.0)) == [1]
    report(core, 1, 1, epoch=2, is_first=True, stored=(7,))
    assert known(core) == {1: 0b01, 7: 0b10}


def test_the_index_is_bounded_and_what_comes_last_is_left_out() -> None:
    ready = made()
    bounded = replace(ready, graph=replace(ready.graph, attrs=limited(ready, 3)))
    core = opened(bounded)
    report(core, 0, 1, is_first=True, stored=(1, 2, 3, 4))
    report(core, 1, 1, is_first=True, stored=(3, 5))
    assert known(core) == {1: 1, 2: 1, 3: 0b11}


def test_what_was_left_out_is_asked_for_once_there_is_room() -> None:
    ready = made()
    core = opened(replace(ready, graph=replace(ready.graph, attrs=limited(ready, 16))))
    report(core, 0, 1, is_first=True, stored=range(10))
    report(core, 1, 1, is_first=True, stored=range(20, 30))
    assert known(core) == dict.fromkeys(range(10), 1) | dict.fromkeys(range(20, 26), 2)
    assert asked(report(core, 0, 2, dropped=(9,))) == []
    report(core, 1, 2, stored=(30,))  # may follow a block that was left out
    assert 30 not in known(core)
    assert asked(report(core, 0, 3, dropped=(8,))) == [1]
    assert known(core) == dict.fromkeys(range(8), 1)
    # The replica is truncated again. Room that a replica makes itself asks no replica.
    assert asked(report(core, 1, 1, is_first=True, stored=range(20, 30))) == []
    assert asked(report(core, 0, 4, stored=(0,))) == []
    assert known(core) == dict.fromkeys(range(8), 1) | dict.fromkeys(range(20, 28), 2)


def test_much_is_forgotten_in_slices_and_counts_for_nothing_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_indexes, "FORGOTTEN_AT_ONCE", 4)
    core = opened()
    prompt = Request(request_id="r", prompt_token_ids=(1,) * 41)
    index, hasher = core.prefixes.indexes["g"], Hasher(hash_secret())
    hashes = hasher.hashes(prompt, 4)
    stored = [int.from_bytes(hashes[at], "big") for at in range(10)]
    report(core, 0, 1, is_first=True, stored=stored)
    report(core, 1, 1, is_first=True, stored=stored[:2])
    core.on(ReplicaMarked("g", 0, is_up=False), 2.0)
    index = core.prefixes.indexes["g"]
    assert index.cached(prompt, hasher).levels == ((8, 0b10),)
    assert core.prefixes.num_blocks_of("g", 0) == 0
    assert asked(core.on(ReplicaMarked("g", 0, is_up=True), 3.0)) == []
    assert len(known(core)) == 2
    assert asked(core.on(TimeCame(), 4.0)) == [0]
    assert known(core) == dict.fromkeys(stored[:2], 0b10)
    report(core, 0, 1, epoch=2, is_first=True, stored=stored[:1])
    assert core.prefixes.indexes["g"].cached(prompt, hasher).levels == ((8, 0b10), (4, 0b01))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_replica_that_begins_anew_unasked_is_asked_where_forgetting_takes_long(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_indexes, "FORGOTTEN_AT_ONCE", at_once)
    core = opened()
    report(core, 0, 1, is_first=True, stored=(1, 2))
    report(core, 0, 2, is_first=True, stored=(2, 3))
    if at_once == 1:
        assert asked(report(core, 0, 3, stored=(4,))) == [0]
        assert known(core) == {}
        report(core, 0, 1, is_first=True, stored=(2, 3))
    assert known(core) == {2: 1, 3: 1}


def test_replicas_share_the_hashes_of_blocks_that_they_share() -> None:
    core = opened()
    for replica in (0, 1):
        report(core, replica, 1, is_first=True, stored=(1, 2))
    kept = [
        {id(block) for block in core.prefixes._reporters["g", replica].blocks.values()}
        for replica in (0, 1)
    ]
    assert kept[0] == kept[1] == {id(block) for block in core.prefixes.indexes["g"].blocks}


def limited(ready: Plan, most: int) -> Any:
    executor = {"kind": "tasks", "max_prefix_blocks": most}
    return type(ready.graph.attrs)(
        {**ready.graph.attrs, "executor": type(ready.graph.attrs)(executor)}
    )


def test_engines_are_not_asked_where_no_operator_wants_to_know() -> None:
    core = Core(made("load_balanced"))
    effects = core.on(Opened("generate", 0, Credit(requests=4), 4), 0.0)
    effects += core.on(ReplicaMarked("g", 0, is_up=False), 1.0)
    effects += core.on(ReplicaMarked("g", 0, is_up=True), 2.0)
    assert asked(effects) == []
    assert core.prefixes.indexes == {}
    report(core, 0, 1, is_first=True, stored=(1,))
    assert core.prefixes.num_blocks == 0
