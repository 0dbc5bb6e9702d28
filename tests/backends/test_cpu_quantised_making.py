"""Quantising a weight: never worse than the plain formulas of Q8_0 and IQ4_NL at the same size."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from sagellm.backends import arrays
from sagellm.backends.cpu import quantised_linear
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.torch_linear import array, quantised, tensor
from sagellm.backends.quantised_weight import LEVELS

BITS = pytest.mark.parametrize("bits", [8, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
WAYS = [None, native_kernels()] if native_kernels() else [None]
IDS = ["torch", "C"][: len(WAYS)]


def quantise(weight, bits, kernels=None):
    if kernels is None:
        return quantised(weight, bits)
    return quantised_linear.quantise(kernels, array(weight), bits)


def weight_of(kind, rows=40, depth=896, seed=1):
    torch.manual_seed(seed)
    drawn = torch.randn(rows, depth) * 0.02
    if kind == "heavy tails":
        drawn = torch.distributions.StudentT(3.0).sample((rows, depth)) * 0.02
    if kind == "outliers":
        drawn[:, ::97] *= 20
    return drawn


def plain(weight, form):
    """Q8_0: absmax / 127; Q4_0: the largest number / -8; IQ4_NL: the largest number / -127, and
    levels. Groups of 32, scales in float16.
    """
    groups = pad(weight, (0, -weight.shape[1] % 32)).view(len(weight), -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    by = {"Q8_0": 127, "Q4_0": -8, "IQ4_NL": -127}[form]
    scales = ((largest.abs() if form == "Q8_0" else largest) / by).half().float()
    numbers = {"Q8_0": range(-127, 128), "Q4_0": range(-8, 8), "IQ4_NL": LEVELS}[form]
    numbers = torch.tensor(numbers, dtype=torch.float32)
    codes = groups / torch.where(scales == 0, 1.0, scales)
    nearest = numbers[torch.searchsorted((numbers[1:] + numbers[:-1]) / 2, codes)]
    return (nearest * scales).flatten(1)[:, : weight.shape[1]]


@BITS
@DTYPES
@pytest.mark.parametrize("kernels", WAYS, ids=IDS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers"])
def test_no_group_is_worse_than_by_the_plain_formula(bits, dtype, kernels, kind):
    weight = weight_of(kind).to(dtype)
    made = tensor(quantise(weight, bits, kernels).dequantised())
    right = weight.float()
    other = plain(right, "IQ4_NL" if bits == 4 else "Q8_0")
    ours, theirs = ((x - right).view(-1, 32).square().sum(-1) for x in (made, other))
    assert bool((ours <= theirs * 1.0001 + 1e-12).all())
    assert ours.sum() < 0.985 * theirs.sum()
    if kind == "normal":
        assert ours.sum() < (0.91 if bits == 4 else 0.86) * theirs.sum()


@pytest.mark.parametrize("kernels", WAYS, ids=IDS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers"])
def test_levels_have_a_quarter_less_squared_error_than_q4_0(kernels, kind):
    weight = weight_of(kind)
    made = tensor(quantise(weight, 4, kernels).dequantised())
    assert (made - weight).square().sum() < 0.75 * (plain(weight, "Q4_0") - weight).square().sum()


@BITS
@pytest.mark.skipif(len(WAYS) == 1, reason="no C compiler on this machine")
@pytest.mark.parametrize("depth", [32, 77, 896])
def test_both_ways_give_the_same(bits, depth):
    weight = weight_of("heavy tails", depth=depth)
    slow, quick = (quantise(weight, bits, way) for way in WAYS)
    assert np.array_equal(slow.scales, quick.scales)
    assert np.array_equal(slow.codes, quick.codes)


@BITS
@pytest.mark.parametrize("kernels", WAYS, ids=IDS)
def test_zeros_and_numbers_that_float16_lacks(bits, kernels):
    weight = torch.zeros(3, 64)
    weight[1, :32] = 1e-12
    weight[2] = torch.linspace(-1e7, 1e7, 64)
    made = tensor(quantise(weight, bits, kernels).dequantised())
    assert not made[:2].any()
    assert made.isfinite().all()


@BITS
def test_a_large_weight_is_made_in_parts(bits, monkeypatch):
    monkeypatch.setattr("sagellm.backends.cpu.torch_linear._NUMBERS_AT_ONCE", 3 * 96)
    weight = weight_of("normal", rows=10, depth=96)
    parts, whole = quantise(weight, bits), quantise(weight[:1], bits)
    assert parts.shape == (10, 96)
    assert np.array_equal(parts.codes[:1], whole.codes)


@pytest.mark.skipif(len(WAYS) == 1, reason="no C compiler on this machine")
@BITS
def test_a_large_weight_is_quantised_and_packed_in_parts(bits, monkeypatch):
    kernels, weight, freed = WAYS[1], array(weight_of("normal", 300, 77)), []
    whole = quantised_linear.quantise(kernels, weight, bits, 2, lambda: pytest.fail("it is small"))
    packed = quantised_linear._packed_codes(whole)
    monkeypatch.setattr(arrays, "_READ_AT_ONCE", 70 * 77 * weight.itemsize)
    monkeypatch.setattr(quantised_linear, "_PACKED_AT_ONCE", 70 * 77)
    parts = quantised_linear.quantise(kernels, weight, bits, 2, lambda: freed.append(1))
    assert len(freed) == -(-300 // 64)
    assert np.array_equal(parts.codes, whole.codes)
    assert np.array_equal(parts.scales, whole.scales)
    assert np.array_equal(quantised_linear._packed_codes(parts), packed)
