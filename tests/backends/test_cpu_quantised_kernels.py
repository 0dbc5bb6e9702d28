"""The C kernels of quantised weights against torch, at sizes that leave remainders everywhere."""

import functools

import pytest
import torch
from compiled_sources import compile_for

from sagellm.backends.cpu import quantised_linear
from sagellm.backends.cpu.native import compiler
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.torch_linear import array, dequantising, rounded, tensor
from sagellm.backends.quantised_weight import QuantisedWeight

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
FORMS = pytest.mark.parametrize(("bits", "row_bits"), [(8, 16), (8, 8), (4, 16), (4, 8)])
SIZES = pytest.mark.parametrize(
    ("width", "depth", "group"), [(1, 32, 32), (7, 77, 32), (33, 2061, 64), (48, 1024, 128)]
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(4)


class PackedQuantised:
    """A product of the library on tensors."""

    def __init__(self, kernels, weight, bias, row_bits):
        offset = None if bias is None else array(bias)
        self.made = quantised_linear.PackedQuantised(kernels, weight, offset, row_bits)

    def __call__(self, rows, threads=1):
        return torch.from_numpy(self.made(array(rows), threads))


def random_weight(bits, width, depth, group=32, *, zeros=False, order=False, levels=False):
    groups = -(-depth // group)
    low, high = (0, 16) if bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (width, depth))
    return QuantisedWeight(
        bits,
        group,
        array(codes.to(torch.uint8 if bits == 4 else torch.int8)),
        array((torch.rand(width, groups) / 100 + 1e-3).half()),
        array(torch.randint(low, high + 1, (width, groups)).short()) if zeros else None,
        array(torch.randperm(depth).int()) if order else None,
        levels,
    )


def dequantised(weight):
    return tensor(weight.dequantised()).double()


def wanted(weight, x, bias, row_bits):
    if weight.order is None:
        seen = rounded(x, row_bits)
    else:
        seen = torch.empty_like(x)
        order = tensor(weight.order).long()
        seen[:, order] = rounded(x[:, order], row_bits)
    product = seen.double() @ dequantised(weight).T
    return product if bias is None else product + bias


def error(found, right):
    return float((found - right).norm() / right.norm())


@FORMS
@SIZES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 67, 130])
def test_products_are_those_of_the_rounded_rows(bits, row_bits, width, depth, group, rows):
    weight, x, bias = random_weight(bits, width, depth, group), torch.randn(rows, depth), None
    if width > 1:
        bias = torch.randn(width)
    found = PackedQuantised(KERNELS, weight, bias, row_bits)(x)
    assert error(found, wanted(weight, x, bias, row_bits)) < 1e-5


@FORMS
@SIZES
def test_zeros_and_order(bits, row_bits, width, depth, group):
    weight = random_weight(bits, width, depth, group, zeros=True, order=True)
    x = torch.randn(6, depth)
    found = PackedQuantised(KERNELS, weight, None, row_bits)(x)
    assert error(found, wanted(weight, x, None, row_bits)) < 1e-5


@SIZES
@pytest.mark.parametrize("row_bits", [8, 16])
@pytest.mark.parametrize("rows", [1, 5, 13, 67])
def test_codes_may_stand_for_levels(row_bits, width, depth, group, rows):
    weight, x = random_weight(4, width, depth, group, levels=True), torch.randn(rows, depth)
    found = PackedQuantised(KERNELS, weight, None, row_bits)(x)
    assert error(found, wanted(weight, x, None, row_bits)) < 1e-5


@FORMS
@pytest.mark.parametrize("levels", [False, True])
def test_the_largest_numbers_do_not_overflow(bits, row_bits, levels):
    x = torch.cat([torch.ones(1, 64), -torch.ones(1, 64), torch.ones(1, 64) * 1e6])
    for code in (0, 15) if bits == 4 else (-127, 127):
        weight = random_weight(bits, 16, 64, levels=levels and bits == 4)
        weight.codes.fill(code)
        found = PackedQuantised(KERNELS, weight, None, row_bits)(x)
        assert error(found, x.double() @ dequantised(weight).T) < 1e-6


@FORMS
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e20])
def test_rows_of_any_size(bits, row_bits, scale):
    weight, x = random_weight(bits, 5, 96), torch.randn(3, 96) * scale
    found = PackedQuantised(KERNELS, weight, None, row_bits)(x)
    assert torch.allclose(found.double(), wanted(weight, x, None, row_bits), rtol=1e-3, atol=1e-30)


@FORMS
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [3, 40, 76])
def test_a_row_that_is_not_finite_does_not_look_finite(bits, row_bits, value, place):
    x = torch.randn(3, 77)
    x[1, place] = value
    found = PackedQuantised(KERNELS, random_weight(bits, 33, 77), None, row_bits)(x)
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()


def test_rows_of_16_bits_lose_next_to_nothing():
    weight, x = random_weight(8, 40, 896), torch.randn(4, 896)
    found = PackedQuantised(KERNELS, weight, None, 16)(x)
    assert error(found, x.double() @ dequantised(weight).T) < 3e-5


@FORMS
@pytest.mark.parametrize("depth", [77, 2061])
def test_a_row_has_the_same_bits_at_any_place_of_any_batch(bits, row_bits, depth):
    x = torch.randn(600, depth)  # more than a thread keeps at a time
    packed = PackedQuantised(KERNELS, random_weight(bits, 31, depth, zeros=True), None, row_bits)
    whole = packed(x)
    for size in (1, 2, 3, 4, 5, 6, 9, 127, 200):
        some = min(len(x), 20 * size)
        parts = [packed(part) for part in torch.split(x[:some], size)]
        assert torch.equal(torch.cat(parts), whole[:some])


def test_rows_may_be_strided_and_threads_more_than_panels():
    packed = PackedQuantised(KERNELS, random_weight(4, 5, 64), None, 8)
    x = torch.randn(6, 100)
    found = packed(x[:, 8:72])
    assert torch.equal(found, packed(x[:, 8:72].contiguous()))
    assert torch.equal(packed(x[:, 8:72], 7), found)


@FORMS
@pytest.mark.parametrize("num_rows", [1, 64, 200])
def test_threads_share_rows_or_columns_and_change_no_bit(bits, row_bits, num_rows):
    packed = PackedQuantised(KERNELS, random_weight(bits, 97, 301), torch.randn(97), row_bits)
    x = torch.randn(num_rows, 301)
    found = [packed(x, threads) for threads in (1, 2, 3)]
    assert all(torch.equal(one, found[0]) for one in found)


@FORMS
@pytest.mark.parametrize("alone", [False, True])
def test_torch_alone_agrees(bits, row_bits, alone):
    weight, x = random_weight(bits, 70, 77, order=True), torch.randn(5, 77)
    bias = torch.randn(70)
    quick = PackedQuantised(KERNELS, weight, bias, row_bits)(x)
    slow = dequantising(weight, bias, row_bits, alone=alone)
    exact = 1e-5 if bits == row_bits else 1e-2  # it leaves rows as they are, but in w8a8
    assert error(slow(x), quick) < exact
    parts = torch.cat([slow(row) for row in x.split(1)])
    assert torch.equal(parts, slow(x)) if alone else torch.allclose(parts, slow(x), atol=1e-5)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(flags) -> the kernels compiled with these flags."""
    common = ("-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-Wno-psabi")

    @functools.cache
    def build(flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(compiler, "_FLAGS", (*common, *flags))
            return NativeKernels(compiler.compiled())

    return build


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="plain C"),
        pytest.param(("-mavx2", "-mfma", "-mf16c"), id="AVX2", marks=pytest.mark.soak),
    ],
)
@FORMS
@pytest.mark.parametrize("levels", [False, True])
def test_other_cpus_get_the_same(flags, bits, row_bits, levels, built):
    if flags and not torch.cpu._is_avx2_supported():
        pytest.skip("a CPU without AVX2")
    other = built(flags)
    has_levels = levels and bits == 4
    weight = random_weight(bits, 33, 301, 64, zeros=not has_levels, levels=has_levels)
    weight.scales[0, :3] = [1e-7, 6e4, -3e-5]  # subnormal, huge, negative
    x = torch.randn(5, 301)
    found, own = (PackedQuantised(k, weight, None, row_bits)(x) for k in (other, KERNELS))
    assert error(found, own) < 1e-6


@FORMS
def test_other_cpus_show_a_row_that_is_not_finite(bits, row_bits, built):
    x = torch.randn(2, 77)
    x[1, 40] = torch.nan
    found = PackedQuantised(built(()), random_weight(bits, 33, 77), None, row_bits)(x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.soak
def test_the_code_for_vnni_compiles(tmp_path):
    """The kernels without VNNI. Where the CPU has VNNI, all other tests here run with it."""
    compile_for("icelake-server", "quant.c", tmp_path)
