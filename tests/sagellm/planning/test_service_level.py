"""Service levels: how they are written, and what meets them."""

import pytest

from sagellm.planning.service_level import PlanError, ServiceLevel, parse_service_level


def test_a_level_is_read():
    assert parse_service_level("ttft=2,tpot=0.05") == ServiceLevel(2.0, 0.05, 0.9)
    assert parse_service_level("tpot=0.05, attainment=0.99") == ServiceLevel(None, 0.05, 0.99)


@pytest.mark.parametrize(
    ("text", "cause", "fix"),
    [
        ("tfft=2", "no such bound", "ttft"),
        ("latency=2", "no such bound", "write ttft=SECONDS"),
        ("ttft=soon", "no number above 0", "write ttft="),
        ("ttft", "no number above 0", "write ttft="),
        ("ttft=0", "no number above 0", "write ttft="),
        ("ttft=inf", "no number above 0", "write ttft="),
        ("ttft=1,ttft=2", "given twice", "leave one out"),
        ("ttft=1,attainment=90", "at most 1", "write ttft="),
        ("attainment=0.9", "neither", "write ttft="),
        ("", "no such bound", "write ttft="),
    ],
)
def test_a_wrong_level_is_refused(text, cause, fix):
    with pytest.raises(PlanError, match=cause) as error:
        parse_service_level(text)
    assert fix in error.value.fix


def test_a_level_says_what_it_is():
    assert str(ServiceLevel(2, None, 0.95)) == "TTFT <= 2 s for 0.95 of requests"
