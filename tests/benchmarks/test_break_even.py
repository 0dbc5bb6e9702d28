"""The benchmark of splits: it finds rates, and its placements have equal hardware."""

import pytest

from benchmarks.simulation.break_even import Study, alike, highest_rate, placements
from sagellm.planning.service_level import parse_service_level


@pytest.mark.parametrize("limit", [1.0, 1.5, 7.0, 300.0])
def test_the_highest_rate_is_found(limit):
    assert limit / 1.03 <= highest_rate(lambda rate: rate <= limit) <= limit


def test_no_rate_holds():
    assert highest_rate(lambda rate: False) == 0.0


def test_splits_have_as_many_devices_as_those_they_are_compared_with():
    numbers = {name: one.num_gpus for name, one in placements().items()}
    assert numbers["1:1"] == numbers["2 alike, 2048"] == 2
    assert numbers["1:3"] == numbers["2:2"] == numbers["3:1"] == numbers["4 alike, 512"] == 4


def test_a_device_serves_a_low_rate_and_no_high_one():
    level = parse_service_level("ttft=0.2,tpot=0.015")
    study = Study("llama-3-8b", "h100-sxm", level, 4, None, 0.0, 30)
    assert study.attains(alike(1, 2048), 2000, 1.0)
    assert not study.attains(alike(1, 2048), 2000, 1000.0)
