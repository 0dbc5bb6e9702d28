import pytest

from benchmarks.overhead import Call, share_outside


def test_the_share_is_of_steps_that_decode_the_same_number() -> None:
    calls = [
        Call(0.0, 5.0, 0),  # a prefill
        Call(6.0, 7.0, 32),
        Call(8.0, 9.0, 32),
        Call(10.0, 11.0, 32),
        Call(12.0, 12.1, 31),  # one has ended
    ]
    found = share_outside(calls, 32)
    assert (found["num_steps"], found["step_ms"], found["program_ms"]) == (2, 2000.0, 1000.0)
    assert found["share_outside"] == 0.5
    assert found["outside_ms"] == 1000.0


def test_steps_that_were_never_in_a_row_are_no_share() -> None:
    with pytest.raises(ValueError, match="decoded 32"):
        share_outside([Call(0.0, 1.0, 32), Call(1.0, 2.0, 0)], 32)
