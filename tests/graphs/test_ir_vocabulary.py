"""The declared ops: ports by name, option types, and the nearest name."""

from dataclasses import dataclass
from typing import Literal

import pytest

from sagellm.graphs.vocabulary import NoOptions, OpSpec, Port, Vocabulary, nearest


@dataclass(frozen=True, slots=True)
class Sorting:
    policy: Literal["fifo", "priority"]
    window: int | None = None


SORT = OpSpec("sort", outlets=(Port("kept"), Port("late")), options=Sorting)


def test_ports_are_found_by_name() -> None:
    assert SORT.inlet("in") == Port("in")
    assert SORT.outlet("late") == Port("late")
    assert SORT.outlet("out") is None
    assert SORT.inlet("left") is None


def test_option_types_are_resolved_annotations() -> None:
    assert SORT.option_types == {"policy": Literal["fifo", "priority"], "window": int | None}
    assert OpSpec("x").option_types == {}
    assert OpSpec("x").options is NoOptions


def test_options_must_be_a_dataclass() -> None:
    with pytest.raises(TypeError, match="options of x"):
        _ = OpSpec("x", options=int).option_types


def test_a_vocabulary_is_a_mapping_of_its_own() -> None:
    specs = {"sort": SORT}
    vocabulary = Vocabulary(specs)
    specs.clear()
    assert vocabulary["sort"] is SORT
    assert list(vocabulary) == ["sort"]
    assert "route" not in vocabulary


@pytest.mark.parametrize(
    ("name", "found"), [("polcy", "policy"), ("windw", "window"), ("zzz", None), ("", None)]
)
def test_the_nearest_name_is_a_likely_slip(name: str, found: str | None) -> None:
    assert nearest(name, ["policy", "window"]) == found
