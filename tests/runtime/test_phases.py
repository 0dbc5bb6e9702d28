from typing import Any

import pytest

from sagellm.runtime.handover import Phases, phases_of
from sagellm.runtime.messages import Stamps

FULL = {"started_s": 2.0, "prefilled_s": 4.0, "transferred_s": 4.5, "finished_s": 9.0}


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        (FULL, (1.0, 2.0, 0.5, 4.5)),
        ({**FULL, "dispatched_s": 1.5}, (1.0, 2.0, 0.5, 4.5)),
        ({**FULL, "transferred_s": None}, (1.0, 2.0, 0.0, 5.0)),  # joint
        ({"dispatched_s": 1.5, "finished_s": 3.0}, (2.0, 0.0, 0.0, 0.0)),  # ended in a queue
        ({"started_s": 2.0, "finished_s": 3.0}, (1.0, 1.0, 0.0, 0.0)),  # ended in prefill
        ({}, (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_phases_add_up_to_the_whole(passed: Any, expected: Any) -> None:
    stamps = Stamps(arrived_s=1.0, **passed)
    assert phases_of(stamps) == expected
    assert sum(expected) == (stamps.finished_s or 1.0) - 1.0


def test_phases_add() -> None:
    assert Phases(1, 2, 3, 4).plus(Phases(queue_s=1)) == (2, 2, 3, 4)
