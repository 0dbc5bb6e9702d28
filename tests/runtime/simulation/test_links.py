"""Links share the bandwidth of their ports, begin late, and end with a replica that dies."""

import pytest

from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.port import EngineLost
from sagellm.runtime.simulation.links import Links
from sagellm.runtime.simulation.timeline import Timeline

P0, P1 = EngineReplica("p", 0), EngineReplica("p", 1)
D0, D1 = EngineReplica("d", 0), EngineReplica("d", 1)


def ends(*transfers, latency_s=0.0, speeds=None, dies=None):
    """The time at which each transfer (begin, sender, receiver, bytes) ends, or who was lost."""
    timeline = Timeline()
    links = Links(timeline, speeds or {"p": 100.0, "d": 100.0}, latency_s=latency_s)
    found = [None] * len(transfers)

    async def move(index, begin_s, *what):
        await timeline.sleep(begin_s)
        try:
            await links.transfer(*what)
        except EngineLost as error:
            found[index] = str(error)
        else:
            found[index] = timeline.now

    for index, one in enumerate(transfers):
        timeline.start_soon(lambda index=index, one=one: move(index, *one))
    if dies is not None:
        timeline.at(dies[0], lambda: links.drop(dies[1]))
    timeline.run()
    return found, links.num_bytes


def test_one_transfer_has_the_whole_port():
    assert ends((1.0, P0, D0, 200)) == ([3.0], 200)


def test_transfers_of_one_sender_share_its_port():
    assert ends((0.0, P0, D0, 100), (0.0, P0, D1, 100)) == ([2.0, 2.0], 200)


def test_transfers_to_one_receiver_share_its_port():
    assert ends((0.0, P0, D0, 100), (0.0, P1, D0, 100)) == ([2.0, 2.0], 200)


def test_transfers_between_different_replicas_do_not_meet():
    assert ends((0.0, P0, D0, 100), (0.0, P1, D1, 100)) == ([1.0, 1.0], 200)


def test_a_transfer_is_faster_once_another_has_ended():
    found, _ = ends((0.0, P0, D0, 150), (1.0, P0, D1, 100))
    assert found == [pytest.approx(2.0), pytest.approx(2.5)]


def test_the_slower_port_limits_a_transfer():
    assert ends((0.0, P0, D0, 100), speeds={"p": 100.0, "d": 50.0})[0] == [2.0]


def test_a_transfer_begins_after_the_latency():
    assert ends((0.0, P0, D0, 100), latency_s=0.5)[0] == [1.5]


@pytest.mark.parametrize("dead", [P0, D0])
def test_a_replica_that_dies_ends_its_transfers_only(dead):
    found, _ = ends((0.0, P0, D0, 1000), (0.0, P1, D1, 200), dies=(1.0, dead))
    assert found == [f"replica 0 of engine {dead.engine} is gone", 2.0]


@pytest.mark.parametrize("dead", [P0, D0])
def test_a_replica_that_dies_during_the_latency_ends_the_transfer_too(dead):
    found, moved = ends((0.0, P0, D0, 100), latency_s=2.0, dies=(1.0, dead))
    assert (found, moved) == ([f"replica 0 of engine {dead.engine} is gone"], 0)


def test_a_transfer_takes_no_bandwidth_before_it_begins():
    found, _ = ends((0.0, P0, D0, 100), (0.5, P0, D1, 100), latency_s=1.0)
    assert found == [pytest.approx(2.5), pytest.approx(3.0)]
