"""Quantising a weight: never worse than the plain formulas of Q8_0 and Q4_0 at the same size."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from sagellm.backends.cpu import quantised_linear
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.torch_linear import array, quantised, tensor

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


def plain(weight, bits):
    """Q8_0: absmax / 127; Q4_0: the largest number / -8. Groups of 32, scales in float16."""
    groups = pad(weight, (0, -weight.shape[1] % 32)).view(len(weight), -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (largest / -8 if bits == 4 else largest.abs() / 127).half().float()
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    codes = (groups / torch.where(scales == 0, 1.0, scales)).round().clamp(low, high)
    return (codes * scales).flatten(1)[:, : weight.shape[1]]


@BITS
@DTYPES
@pytest.mark.parametrize("kernels", WAYS, ids=IDS)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers"])
def test_no_group_is_worse_than_by_the_plain_formula(bits, dtype, kernels, kind):
    weight = weight_of(kind).to(dtype)
    made = tensor(quantise(weight, bits, kernels).dequantised())
    right = weight.float()
    ours, theirs = ((x - right).view(-1, 32).square().sum(-1) for x in (made, plain(right, bits)))
    assert bool((ours <= theirs * 1.0001 + 1e-12).all())
    assert ours.sum() < 0.985 * theirs.sum()
    if kind == "normal":
        assert ours.sum() < (0.91 if bits == 4 else 0.86) * theirs.sum()


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
