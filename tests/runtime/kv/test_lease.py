"""The life cycle of a lease: every event has one meaning in every state, or none."""

from typing import get_args

import pytest

from sagellm.runtime.kv.lease import FAULTS, LIVE, TRANSITIONS, Fence, Lease, LeaseEvent, LeaseState
from sagellm.runtime.port import StaleLease


def lease_in(state):
    return Lease(1, Fence("r", 0, 0), "sequence", [], 0, 0, state=state)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("state", get_args(LeaseState))
def test_every_fault_releases_in_every_state(state, fault):
    assert lease_in(state).next_state(fault) == "released"


def test_a_released_lease_stays_released():
    after = {target for (state, _), target in TRANSITIONS.items() if state == "released"}
    assert after == {"released"}


def test_source_walks_reserved_filled_sending_released():
    lease = lease_in("reserved")
    for event, state in (("fill", "filled"), ("send", "sending"), ("acknowledge", "released")):
        lease.state = lease.next_state(event)
        assert lease.state == state


def test_destination_walks_reserved_receiving_filled_released():
    lease = lease_in("reserved")
    for event, state in (("receive", "receiving"), ("arrive", "filled"), ("finish", "released")):
        lease.state = lease.next_state(event)
        assert lease.state == state


def test_a_transition_outside_the_table_is_stale():
    with pytest.raises(StaleLease, match="lease 1 is sending: it cannot finish"):
        lease_in("sending").next_state("finish")


def test_the_table_is_closed():
    for (state, event), target in TRANSITIONS.items():
        assert state in get_args(LeaseState)
        assert event in get_args(LeaseEvent)
        assert target in get_args(LeaseState)
    assert set(LIVE) == set(get_args(LeaseState)) - {"released"}


def test_require_names_the_state():
    with pytest.raises(StaleLease, match="is filled, not sending or receiving"):
        lease_in("filled").require("sending", "receiving")


def test_ref_carries_the_fence():
    ref = Lease(9, Fence("r", 2, 3), "sequence", [], 17, 32).ref("p", 1)
    assert (ref.engine, ref.replica, ref.lease_id) == ("p", 1, 9)
    assert (ref.request_id, ref.choice, ref.epoch, ref.num_tokens) == ("r", 2, 3, 17)
