"""Diagnostics: their text, and their positions in a file."""

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Position, locate, position_of

POSITIONS = {
    (): Position("f", 1, 1),
    ("operators",): Position("f", 2, 1),
    ("operators", "sort"): Position("f", 3, 3),
    ("operators", "sort", "window"): Position("f", 3, 20),
}


def test_a_diagnostic_says_place_mistake_and_fix() -> None:
    found = Diagnostic("x", ("operators", "sort"), "wrong", "remove it", Position("pd.yaml", 3, 7))
    assert str(found) == "pd.yaml:3:7: wrong (remove it)"


def test_without_a_position_the_path_is_the_place() -> None:
    assert str(Diagnostic("x", ("edges", 2), "wrong")) == "edges.2: wrong"
    assert str(Diagnostic("x", (), "wrong")) == "wrong"


def test_an_error_carries_and_prints_all() -> None:
    found = (Diagnostic("x", (), "one"), Diagnostic("y", (), "two"))
    error = GraphError(found)
    assert error.diagnostics == found
    assert str(error) == "one\ntwo"


def test_a_path_is_placed_at_the_nearest_that_encloses_it() -> None:
    assert position_of(("operators", "sort", "window"), POSITIONS) == Position("f", 3, 20)
    assert position_of(("operators", "sort", "window", "value"), POSITIONS) == Position("f", 3, 20)
    assert position_of(("operators", "route", "strategy"), POSITIONS) == Position("f", 2, 1)
    assert position_of(("edges", 0), POSITIONS) == Position("f", 1, 1)
    assert position_of(("edges", 0), {}) is None


def test_locating_sorts_by_line_and_keeps_known_positions() -> None:
    late = Diagnostic("x", ("operators", "sort"), "late")
    early = Diagnostic("y", (), "early")
    fixed = Diagnostic("z", (), "fixed", position=Position("f", 9, 9))
    found = locate((fixed, late, early), POSITIONS)
    assert [each.message for each in found] == ["early", "late", "fixed"]
    assert found[1].position == Position("f", 3, 3)
    assert found[2].position == Position("f", 9, 9)
