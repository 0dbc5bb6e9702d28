"""The gated products of quantised weights: the bits of the product and silu_mul, in one kernel."""

import ctypes

import numpy as np
import pytest

from sagellm.backends.cpu.native import compiler
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.quantised_linear import PackedQuantised, quantise

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
FORMS = pytest.mark.parametrize(
    ("bits", "row_form"),
    [
        *((4, 8), (4, 16), (8, 8), (8, 16), (4, "pairs"), (8, "pairs")),
        *((4, "8_many"), (8, "8_many"), (8, "16_many")),
    ],
)
HALF = 96
SHARE = ctypes.CFUNCTYPE(  # `multiply` of linear.h
    *(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long),
    *(ctypes.c_long, ctypes.c_int, ctypes.c_int),
)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """The kernels with the model of tiles in plain C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        common = ("-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-Wno-psabi")
        patch.setattr(compiler, "_FLAGS", (*common, "-DSAGE_TILE_MODEL"))
        return NativeKernels(compiler.compiled())


def noise(*shape, seed=7):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def gated(linear, rows, threads):
    """The result of the gated kernel, in columns 1 to HALF + 1 of a wider matrix."""
    out = np.full((len(rows), HALF + 3), np.nan, np.float32)
    multiply = SHARE(NativeLinear.from_address(linear.address).gated)
    for number in range(threads):
        sizes = rows.shape[1], out.ctypes.data + out.itemsize, out.shape[1], len(rows)
        multiply(linear.address, rows.ctypes.data, *sizes, number, threads)
    assert np.isnan(out[:, [0, -2, -1]]).all()
    return out[:, 1 : HALF + 1]


def check(kernels, bits, row_form, depth, counts):
    weight = quantise(kernels, noise(2 * HALF, depth), bits)
    linear = PackedQuantised(kernels, weight, noise(2 * HALF), row_form)
    rows = noise(max(count for count, _ in counts), depth)
    for count, threads in counts:
        gate, up = (np.ascontiguousarray(half) for half in np.split(linear(rows[:count]), 2, 1))
        wanted = kernels.silu_mul(gate, up, 1)
        assert np.array_equal(gated(linear, rows[:count], threads), wanted), (count, threads)


@FORMS
@pytest.mark.parametrize("depth", [32, 77, 896, 2048])
def test_a_gated_product_has_the_bits_of_the_product_and_its_gate(bits, row_form, depth):
    counts = [(1, 1), (1, 2), (2, 3), (13, 2), (25, 4), (63, 2), (129, 1), (300, 2), (300, 5)]
    check(KERNELS, bits, row_form, depth, counts)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_have_a_gated_form_too(tiled, bits):
    check(tiled, bits, "8_many", 1100, [(1, 2), (15, 1), (16, 1), (40, 2), (130, 2)])


@pytest.mark.parametrize(("width", "depth"), [(2 * 16, 64), (2 * 97, 64), (2 * HALF, 2049)])
def test_a_shape_without_a_gated_kernel_has_none(width, depth):
    linear = PackedQuantised(KERNELS, quantise(KERNELS, noise(width, depth), 8), None, 8)
    assert NativeLinear.from_address(linear.address).gated is None
