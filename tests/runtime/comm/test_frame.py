"""Frames: a frame is decoded whole, and other bytes are not decoded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.comm.channel import MAX_FRAME_BYTES, Frame, FrameError, decode, encode

FRAMES = st.builds(
    Frame, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=200)
)


@given(FRAMES)
def test_a_frame_comes_back(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(FRAMES, st.data())
def test_a_changed_bit_is_noticed(frame: Frame, data: st.DataObject) -> None:
    sent = bytearray(encode(frame))
    bit = data.draw(st.integers(0, 8 * len(sent) - 1))
    sent[bit // 8] ^= 1 << bit % 8
    try:
        found = decode(bytes(sent))
    except FrameError:
        return
    # The reserved byte alone is not read.
    assert (found, bit // 8) == (frame, 3)


@given(FRAMES, st.data())
def test_a_part_of_a_frame_is_none(frame: Frame, data: st.DataObject) -> None:
    sent = encode(frame)
    with pytest.raises(FrameError):
        decode(sent[: data.draw(st.integers(0, len(sent) - 1))])


@given(st.binary(max_size=300))
def test_garbage_is_no_frame(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        decode(garbage)


def test_what_is_too_long_is_neither_sent_nor_taken() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        encode(Frame(1, 0, bytes(MAX_FRAME_BYTES)))
    with pytest.raises(FrameError, match="too many"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_another_version_is_refused() -> None:
    sent = bytearray(encode(Frame(1, 0, b"")))
    sent[2] += 1
    with pytest.raises(FrameError, match="both sides must run one release"):
        decode(bytes(sent))
