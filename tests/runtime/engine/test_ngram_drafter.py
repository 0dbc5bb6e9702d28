"""Drafts from a sequence's own tokens: the newest of the longest matches."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.engine.drafters import NgramIndex


def draft(tokens, count=4):
    return NgramIndex().draft(tokens, count)


def test_what_followed_is_proposed():
    assert draft([1, 2, 3, 4, 5, 6, 9, 1, 2], 3) == [3, 4, 5]


def test_without_a_match_there_is_no_draft():
    assert draft([1, 2, 3, 4]) == []
    assert draft([1]) == draft([1, 1]) == []


def test_the_longer_match_wins_over_the_newer():
    assert draft([5, 1, 2, 3, 70, 9, 2, 3, 80, 5, 1, 2, 3], 1) == [70]


def test_among_equal_matches_the_newest_wins():
    assert draft([1, 2, 70, 1, 2, 80, 1, 2], 1) == [80]


def test_a_loop_goes_on_in_its_period():
    assert draft([7, 8, 9, 7, 8, 9], 7) == [7, 8, 9, 7, 8, 9, 7]
    assert draft([4, 4, 4], 4) == [4, 4, 4, 4]


def brute_force(tokens, count):
    """The definition itself, for few enough positions."""
    for size in (4, 3, 2):
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[place - size : place] == tokens[-size:]:
                drafts = list(tokens[place:])
                while len(drafts) < count:
                    drafts.append(drafts[-(len(tokens) - place)])
                return drafts[:count]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=18), st.integers(1, 6))
def test_it_is_the_brute_force_answer_after_every_token(tokens, count):
    index = NgramIndex()
    for end in range(1, len(tokens) + 1):
        assert index.draft(tokens[:end], count) == brute_force(tokens[:end], count)


def test_places_far_back_are_not_all_compared():
    tokens = [3, 1, 2, 70] + [1, 2, 80] * 40 + [3, 1, 2]
    assert draft(tokens, 1) == [80]
