import pytest

from benchmarks.cells import Cell
from benchmarks.peers.timing import Figure, error, figure, ratio

ONE = [[1.0, 2.0, 3.0, 4.0, 5.0]]
TWO = [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]


def cell(kind: str, num: int, out: int) -> Cell:
    return Cell("c", kind, num, 100, out)


def test_the_first_token_ends_prefill() -> None:
    assert figure(cell("prefill", 1, 1), [[2.0]]) == Figure(50.0)
    assert figure(cell("ttft", 1, 1), [[0.25]]) == Figure(250.0)


def test_decoding_alone_is_the_tokens_after_the_first() -> None:
    assert figure(cell("decode", 1, 5), ONE) == Figure(1.0)


def test_decoding_together_counts_while_all_are_at_it() -> None:
    assert figure(cell("decode", 2, 3), TWO) == Figure(2.0)  # from 2 s to 3 s, two tokens


def test_sequences_that_never_meet_are_no_figure() -> None:
    with pytest.raises(ValueError, match="never decoded together"):
        figure(cell("decode", 2, 2), [[1.0, 2.0], [3.0, 4.0]])


def test_a_sequence_without_a_token_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no token"):
        figure(cell("batch", 2, 2), [[1.0], []])


def test_a_batch_counts_all_tokens_over_all_time() -> None:
    assert figure(cell("batch", 2, 3), TWO) == Figure(1.5)


def test_a_batch_cut_short_goes_on_like_its_last_half() -> None:
    steps = [10.0, 11.0, 12.0, 14.0, 16.0]
    assert figure(cell("batch", 1, 7), [steps]) == Figure(7 / 20.0, extrapolated_from=5)


def test_decoding_cut_short_says_so() -> None:
    assert figure(cell("decode", 1, 9), ONE) == Figure(1.0, extrapolated_from=5)


def test_the_error_is_a_share_of_the_deviation() -> None:
    exact = [-1.0, -3.0]
    assert error(exact, exact) == 0
    assert error([-1.5, -3.5], exact) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="longer"):
        error([-1.0], exact)


@pytest.mark.parametrize(("kind", "expected"), [("batch", 0.5), ("start", 2.0), ("memory", 2.0)])
def test_above_one_we_are_better(kind: str, expected: float) -> None:
    assert ratio(kind, 10.0, 20.0) == expected
