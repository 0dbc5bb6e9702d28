"""Markers are found in texts that come in pieces."""

from sagellm.chat_formats.text_source import MAX_MARKER_LEN, MarkerFilter, MarkerFinder


def test_the_first_marker_is_found() -> None:
    finder = MarkerFinder(["<a>", "<bc>"])
    assert finder.find("x <bc> <a>") == (2, "<bc>")
    assert finder.find("x <bc> <a>", 3) == (7, "<a>")
    assert finder.find("x <bx>") == (6, "")


def test_an_end_that_may_begin_a_marker_has_a_place() -> None:
    finder = MarkerFinder(["<a>", "<bc>"])
    assert finder.find("x <b") == (2, "")
    assert finder.find("x <b <") == (5, "")


def test_of_markers_at_one_place_the_shortest_counts() -> None:
    finder = MarkerFinder(["abc", "ab", "b"])
    assert finder.find("abc") == (0, "ab")
    assert finder.find("a") == (0, "")


def test_a_marker_that_may_begin_comes_before_one_inside_it() -> None:
    finder = MarkerFinder(["abcd", "bc"])
    assert finder.find("abc") == (0, "")
    assert finder.find("abcx") == (1, "bc")


def test_without_markers_there_is_none() -> None:
    assert MarkerFinder(()).find("<a>") == (3, "")
    assert MarkerFinder(["", "x" * (MAX_MARKER_LEN + 1)]).find("x" * 200) == (200, "")


def test_a_filter_removes_markers() -> None:
    markers = MarkerFilter(["<a>", "]^["])
    assert markers.push("1<a>2<") == "12"
    assert markers.push("a>3<a") == "3"
    assert markers.push("b]^[<") == "<ab"
    assert markers.finish() == "<"
    assert markers.finish() == ""
