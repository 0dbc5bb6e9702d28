"""Sweeps in several processes."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm.simulation.sweep import _shares


@given(st.integers(1, 100), st.integers(2, 8))
def test_each_point_is_measured_once_and_in_order(number, num_processes):
    shares = list(_shares(range(number), num_processes))
    assert [one for share in shares for one in share] == list(range(number))
    assert len(shares) >= min(number, num_processes)
    assert max(map(len, shares)) == 1 or number > 4 * num_processes
