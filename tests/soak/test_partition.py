"""A network partition of a minute."""

import pytest
from network_partition import seen_of


@pytest.mark.timeout(300)
def test_a_worker_is_back_soon_after_its_network() -> None:
    seen = seen_of(60.0)
    print(f"longest wait {seen['longest_gap_s']:.2f} s; back after {seen['back_s']:.2f} s")
    assert seen["is_identical"]
    assert seen["longest_gap_s"] < 2.5
    assert seen["back_s"] <= 2.0
    assert seen["epochs"] == [1, 2]
    assert seen["num_leased"] == 0
