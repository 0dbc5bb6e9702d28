"""Stop strings: found across tokens, and never shown by accident."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.engine.output import OutputText


class Letters:
    """Each token is a piece of text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return ""


def shown(pieces, stop, **options):
    """The text shown after each piece, and the stop string that ended the text."""
    output_text, parts = OutputText(Letters(pieces), stop, **options), []
    for token_id in range(len(pieces)):
        text, matched = output_text.push(token_id)
        parts.append(text)
        if matched is not None:
            return parts, matched
    text, matched = output_text.finish()
    return [*parts, text], matched


def test_without_stop_strings_all_is_shown():
    assert shown(["ab", "c"], ()) == (["ab", "c", ""], None)


def test_a_stop_string_in_one_piece():
    assert shown(["ab", "c\nd", "e"], ("\n",)) == (["ab", "c"], "\n")


def test_a_stop_string_across_pieces_is_held_back():
    assert shown(["ab E", "N", "D!"], ("END",)) == (["ab ", "", ""], "END")


def test_what_was_held_for_nothing_is_shown():
    assert shown(["ab E", "N", "T"], ("END",)) == (["ab ", "", "ENT", ""], None)


def test_what_is_held_at_the_end_is_shown():
    assert shown(["ab E", "N"], ("END",)) == (["ab ", "", "EN"], None)


def test_the_stop_string_can_be_kept():
    assert shown(["ab E", "ND!"], ("END",), keep_stop=True) == (["ab ", "END"], "END")


def test_the_first_of_several_ends_it():
    assert shown(["one two"], ("two", "on")) == ([""], "on")


def test_stop_strings_do_not_count_within_min_tokens():
    assert shown(["a.", "b.", "c."], (".",), min_tokens=2) == (["a.", "b.", "c"], ".")


def test_replay_shows_nothing_again():
    output_text = OutputText(Letters(["ab E", "N", "Dx"]), ("END",))
    output_text.replay([0, 1])
    assert output_text.push(2) == ("", "END")


@pytest.mark.parametrize("keep", [False, True])
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_pieces_do_not_matter(keep, pieces, stop):
    """Text in any pieces is shown as text letter by letter."""
    parts, matched = shown(pieces, tuple(stop), keep_stop=keep)
    whole, wanted = shown(list("".join(pieces)), tuple(stop), keep_stop=keep)
    if matched is None:
        assert "".join(parts) == "".join(whole) == "".join(pieces)
    assert (matched is None) == (wanted is None)
    if not keep:
        assert not any(text in "".join(parts) for text in stop)
