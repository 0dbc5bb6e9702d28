"""Weights that are adjacent in memory are concatenated without a copy, others with a copy."""

import numpy as np
import pytest

from sagellm.backends.arrays import BFLOAT16, to_bfloat16, to_float32
from sagellm.backends.cpu.binding import Binding
from sagellm.backends.interface import LoweringError
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import Graph

LAYOUT = KVLayout(1, 1, 8, 16, "bfloat16")
NAMES, SIZES = ("a", "b", "c"), (3, 5, 2)
WHOLE = to_bfloat16(np.random.default_rng(0).standard_normal((10, 7)))


def bound(weights, dtype=BFLOAT16):
    return Binding(Graph("g"), weights, LAYOUT, dtype, None, False)


def in_one_piece():
    return dict(zip(NAMES, np.split(WHOLE.copy(), np.cumsum(SIZES)[:-1]), strict=True))


def test_neighbours_are_not_copied():
    weights = in_one_piece()
    joined = bound(weights).joined(NAMES, SIZES, 7)
    assert joined.ctypes.data == weights["a"].ctypes.data
    assert np.array_equal(joined, WHOLE)


def test_what_is_joined_outlives_its_parts():
    joined = bound(in_one_piece()).joined(NAMES, SIZES, 7)
    others = [np.zeros_like(WHOLE) for _ in range(100)]  # would take the memory if it were free
    assert np.array_equal(joined, WHOLE)
    assert len(others) == 100


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_neighbours_in_another_order_are_copied(order):
    names, sizes = [NAMES[index] for index in order], [SIZES[index] for index in order]
    weights = in_one_piece()
    joined = bound(weights).joined(names, sizes, 7)
    assert np.array_equal(joined, np.concatenate([weights[name] for name in names]))


def test_strangers_are_copied():
    weights = {name: part.copy() for name, part in in_one_piece().items()}
    assert np.array_equal(bound(weights).joined(NAMES, SIZES, 7), WHOLE)


def test_another_dtype_is_joined_too():
    joined = bound(in_one_piece(), np.dtype(np.float32)).joined(NAMES, SIZES, 7)
    assert np.array_equal(joined, to_float32(WHOLE))


def test_a_wrong_shape_is_named():
    with pytest.raises(LoweringError, match="'b'"):
        bound(in_one_piece()).joined(NAMES, (3, 4, 2), 7)


def test_parts_that_are_adjacent_are_one_array():
    names, sizes = ("a", "b"), (3, 5)
    memory = np.arange(40, dtype=np.float32).reshape(8, 5)
    adjacent = bound({"a": memory[:3], "b": memory[3:]}, memory.dtype).parts(names, sizes, 5)
    assert [part.tobytes() for part in adjacent] == [memory.tobytes()]
    apart = bound({"a": memory[:3], "b": memory[3:].copy()}, memory.dtype)
    assert [len(part) for part in apart.parts(names, sizes, 5)] == [3, 5]
