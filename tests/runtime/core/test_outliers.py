"""Replicas whose transfers fail: which are ejected, for how long, and which never are."""

from dataclasses import dataclass, field

import pytest

from sagellm.runtime.core.outliers import FIRST_S, MOST_FAULTS, Outliers
from sagellm.runtime.messages import EngineReplica

P0, P1 = EngineReplica("p", 0), EngineReplica("p", 1)
D0, D1, D2 = EngineReplica("d", 0), EngineReplica("d", 1), EngineReplica("d", 2)


@dataclass
class World:
    """Replicas by engine, the lost ones, all changes that were reported, and the time."""

    num: dict[str, int] = field(default_factory=lambda: {"p": 2, "d": 3, "other": 1})
    lost: set[EngineReplica] = field(default_factory=set)
    changes: list[tuple[EngineReplica, bool]] = field(default_factory=list)
    now_s: float = 0.0

    def is_lost(self, replica: EngineReplica) -> bool:
        return replica in self.lost

    def num_present(self, engine: str) -> int:
        return self.num[engine] - sum(name == engine for name, _ in self.lost)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def outliers(world: World) -> Outliers:
    def note(replica: EngineReplica, for_s: float) -> None:
        world.changes.append((replica, for_s == 0))

    return Outliers(world, lambda: world.now_s, note)


def fail(outliers: Outliers, receiver: EngineReplica, times: int = MOST_FAULTS) -> None:
    """Fail transfers from both senders in turns. Both succeed elsewhere, so that neither is to
    blame.
    """
    for number in range(times):
        sender = (P0, P1)[number % 2]
        outliers.failed(sender, receiver)
        outliers.passed(sender, EngineReplica("other", 0))


def test_after_so_many_faults_in_a_row_it_is_out(outliers, world):
    fail(outliers, D0, MOST_FAULTS - 1)
    assert world.changes == []
    fail(outliers, D0, 1)
    assert world.changes == [(D0, False)]
    assert outliers.is_ejected(D0)
    assert outliers.next_end_s == FIRST_S


def test_one_success_begins_anew(outliers, world):
    fail(outliers, D0, MOST_FAULTS - 1)
    outliers.passed(P0, D0)
    fail(outliers, D0, MOST_FAULTS - 1)
    assert world.changes == []


def test_it_is_tried_again_and_each_time_later(outliers, world):
    for number in (1, 2, 3):
        fail(outliers, D0)
        world.now_s += FIRST_S * number - 0.1
        outliers.readmit_due()
        assert outliers.is_ejected(D0)
        world.now_s += 0.1
        outliers.readmit_due()
        assert not outliers.is_ejected(D0)
    assert world.changes == [(D0, False), (D0, True)] * 3
    assert outliers.num_ejections[D0] == 3


def test_who_was_well_for_long_begins_with_the_first_time(outliers, world):
    fail(outliers, D0)
    world.now_s += FIRST_S
    outliers.readmit_due()
    world.now_s += FIRST_S
    outliers.passed(P0, D0)
    fail(outliers, D0)
    assert outliers.next_end_s == world.now_s + FIRST_S


def test_never_more_than_half(outliers, world):
    fail(outliers, D0)
    fail(outliers, D1)  # a second ejection would be two of three
    assert world.changes == [(D0, False)]
    world.num["d"] = 4
    fail(outliers, D1, 1)
    assert world.changes == [(D0, False), (D1, False)]


def test_the_only_one_stays(outliers, world):
    world.num["d"] = 1
    fail(outliers, D0, 20)
    assert world.changes == []


def test_what_is_lost_counts_neither_as_there_nor_as_a_fault(outliers, world):
    world.lost = {D1, D2}
    fail(outliers, D0)
    assert world.changes == []
    world.lost = {P0, P1}
    fail(outliers, D0)
    assert world.changes == []


def test_a_death_that_was_noticed_late_is_not_held_against_its_peers(outliers, world):
    for _ in range(MOST_FAULTS):
        outliers.failed(P0, D0)
    assert outliers.is_ejected(D0)
    outliers.forget(P0)
    assert not outliers.is_ejected(D0)
    assert world.changes[-1] == (D0, True)


def test_of_a_pair_that_always_meets_the_receiver_goes_first(outliers, world):
    for _ in range(MOST_FAULTS):
        outliers.failed(P0, D0)
    assert world.changes == [(D0, False)]


def test_a_sender_that_fails_with_all_is_the_one(outliers, world):
    for number in range(MOST_FAULTS):
        outliers.failed(P0, EngineReplica("d", number % 3))
    assert world.changes == [(P0, False)]


def test_where_the_others_are_lost_it_is_needed(outliers, world):
    world.num["d"] = 2
    fail(outliers, D0)
    world.lost.add(D1)
    outliers.forget(D1)
    assert not outliers.is_ejected(D0)
    assert world.changes[-1] == (D0, True)


def test_neither_a_late_success_nor_the_death_of_another_ends_it_early(outliers, world):
    fail(outliers, D0)
    outliers.passed(P0, D0)  # the transfer had begun before
    outliers.forget(D1)
    outliers.forget(EngineReplica("other", 0))
    assert outliers.is_ejected(D0)


def test_what_cannot_be_ejected_keeps_little(outliers, world):
    world.num["d"] = 1
    fail(outliers, D0, 1000)
    assert len(outliers._records[D0].peers) < 100


def test_a_new_life_begins_with_nothing_held_against_it(outliers, world):
    fail(outliers, D0)
    outliers.forget(D0)
    assert not outliers.is_ejected(D0)
    fail(outliers, D0, MOST_FAULTS - 1)
    assert not outliers.is_ejected(D0)
