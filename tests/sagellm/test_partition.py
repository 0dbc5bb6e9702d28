"""A worker whose network fails while its process lives on."""

import pytest
from network_partition import seen_of


@pytest.mark.timeout(180)
def test_a_worker_behind_a_network_that_is_down_is_done_without_and_comes_back() -> None:
    """During the partition no token comes twice, and no stream waits long."""
    seen = seen_of(5.0)
    assert seen["is_identical"]
    assert seen["num_up_while_parted"] == 1
    assert seen["num_moved"] > 0
    assert seen["epochs"] == [1, 2]
    assert seen["num_leased"] == 0
    assert seen["longest_gap_s"] < 2.5
