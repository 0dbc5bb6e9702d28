"""Options: plain values become the frozen dataclass of an operator."""

from dataclasses import dataclass
from typing import Literal

import pytest

from sagellm.graphs.ir import FrozenMap
from sagellm.runtime.registry import OptionError, read_options


@dataclass(frozen=True, slots=True)
class Options:
    size: int
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()


def test_values_are_read_with_their_types() -> None:
    given = FrozenMap({"size": 3, "names": ("x", "y")})
    assert read_options(Options, given) == Options(3, "a", ("x", "y"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": "three"}, "int"),
        ({"size": 1, "kind": "c"}, "Invalid enum value"),
        ({"size": 1, "sise": 2}, "no option 'sise'"),
        ({}, "size"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        read_options(Options, FrozenMap(values))  # type: ignore[arg-type]


def test_the_engine_of_an_operator_may_be_left_to_the_graph() -> None:
    assert read_options(Options, FrozenMap({"size": 1, "engine": "g"})) == Options(1)
