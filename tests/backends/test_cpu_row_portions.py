"""Threads take the rows of a long prompt in portions, so that a slow thread computes fewer rows."""

import ctypes
import threading
import time

import msgspec
import numpy as np
import pytest

from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.translation import _OPS

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
WIDTH = 16
LONG, POINTER, INT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
Multiply = ctypes.CFUNCTYPE(
    None, POINTER, ctypes.POINTER(ctypes.c_float), LONG, POINTER, LONG, LONG, INT, INT
)


def portions(num_rows, *, threads=2, slow_s=0.0, scales=None, tiles=False):
    """The calls of a linear's kernel in a step: (thread, first row, rows, number, threads). Calls
    on helper threads take `slow_s`, and others a tenth of it, so that helpers are awake before all
    portions are taken. `tiles`: whether tiles may multiply.
    """
    calls = []
    arena = np.arange(num_rows, dtype=np.float32).repeat(WIDTH)  # each number is its row's

    def multiply(linear, x, ldx, out, ldo, count, number, sharing):
        calls.append((threading.get_ident(), int(x[0]), count, number, sharing))
        is_helper = threading.current_thread() is not threading.main_thread()
        time.sleep(slow_s if is_helper else slow_s / 10)

    kernel = Multiply(multiply)
    linear = c_structs.NativeLinear(ctypes.cast(kernel, POINTER).value, scales=scales)
    instruction = c_structs.NativeInstruction(op=_OPS.index("linear"), width=WIDTH)
    instruction.weight = ctypes.addressof(linear)
    instruction.inlets[0].width = instruction.outlets[0].width = WIDTH
    step = c_structs.NativeStep(
        instructions=ctypes.addressof(instruction),
        num_instructions=1,
        num_rows=num_rows,
        capacity=num_rows,
        arena=arena.ctypes.data,
    )
    step.batch.tiles = tiles
    KERNELS.run_step(step, threads)
    KERNELS.close_step(step)
    return calls


def taken(calls):
    """How many portions each thread took, fewest first."""
    idents = [call[0] for call in calls]
    return sorted(idents.count(ident) for ident in set(idents))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("num_rows", [384, 385, 511, 1000])
def test_each_row_is_in_one_portion_and_portions_are_equal(num_rows, threads):
    calls = sorted(call[1:] for call in portions(num_rows, threads=threads, slow_s=0.001))
    assert len(calls) % threads == 0
    assert {call[2:] for call in calls} == {(0, 1)}
    firsts, counts = zip(*(call[:2] for call in calls), strict=True)
    assert [*firsts[1:], num_rows] == [f + c for f, c in zip(firsts, counts, strict=True)]
    assert max(counts) <= 48
    assert max(counts) - min(counts) <= 1


def test_a_slow_thread_takes_fewer_portions():
    fewest, most = taken(portions(1000, slow_s=0.05))
    assert fewest < most / 2


def test_portions_have_as_many_rows_as_the_kernels_take_at_once():
    used = KERNELS.tuning.used
    try:
        assert KERNELS.tuning.use(msgspec.structs.replace(used, rows=24))
        assert max(call[2] for call in portions(1000)) == 24
    finally:
        KERNELS.tuning.use(used)


def test_portions_are_larger_where_tiles_multiply():
    assert {call[2] for call in portions(1024, tiles=True)} == {256}


def test_few_rows_are_not_cut():
    assert sorted(call[1:] for call in portions(255)) == [(0, 255, 0, 2), (0, 255, 1, 2)]


def test_rows_of_a_quantised_weight_are_not_cut():
    calls = portions(1000, scales=1)
    assert sorted(call[1:] for call in calls) == [(0, 1000, 0, 2), (0, 1000, 1, 2)]


def test_one_thread_cuts_nothing():
    assert [call[1:] for call in portions(1000, threads=1)] == [(0, 1000, 0, 1)]
