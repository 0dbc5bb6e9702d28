"""The products of many rows with quantised weights, in bfloat16: vectors, tiles, and plain C."""

import functools
import platform

import pytest
import torch
from compiled_sources import compile_for

from sagellm.backends.cpu import CpuBackend, quantised_linear
from sagellm.backends.cpu.native import compiler
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.torch_linear import array, tensor
from sagellm.backends.quantised_weight import QuantisedWeight

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
BITS = pytest.mark.parametrize("bits", [4, 8])
WAYS = pytest.mark.parametrize(
    "flags",
    [
        pytest.param(None, id="this CPU"),
        pytest.param(("-DSAGE_TILE_MODEL",), id="tiles"),
        pytest.param((), id="plain C", marks=pytest.mark.soak),
        pytest.param(("-DSAGE_TILE_MODEL", "-march=native"), id="tiles, vectors"),
    ],
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(flags) -> the kernels compiled with these flags; None: those of this CPU."""
    common = ("-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-Wno-psabi")

    @functools.cache
    def build(flags):
        if flags is None:
            return KERNELS
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(compiler, "_FLAGS", (*common, *flags))
            return NativeKernels(compiler.compiled())

    return build


class PackedQuantised:
    """A product of the library on tensors."""

    def __init__(self, kernels, weight, bias, row_form):
        offset = None if bias is None else array(bias)
        self.made = quantised_linear.PackedQuantised(kernels, weight, offset, row_form)

    def __call__(self, rows, threads=2):
        return torch.from_numpy(self.made(array(rows), threads))


def random_weight(bits, width, depth, group=32, form=""):
    groups = -(-depth // group)
    low, high = (0, 16) if bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (width, depth))
    return QuantisedWeight(
        bits,
        group,
        array(codes.to(torch.uint8 if bits == 4 else torch.int8)),
        array((torch.rand(width, groups) / 100 + 1e-3).half()),
        array(torch.randint(low, high + 1, (width, groups)).short()) if form == "zeros" else None,
        array(torch.randperm(depth).int()) if form == "zeros" else None,
        form == "levels",
    )


def error(found, right):
    return float((found - right).norm() / right.norm())


def wanted(weight, x, bias):
    rounded = tensor(weight.dequantised()).bfloat16().double()
    return x.bfloat16().double() @ rounded.T + bias


@WAYS
@pytest.mark.parametrize(
    ("width", "depth", "group"), [(1, 32, 32), (7, 77, 32), (40, 2061, 64), (130, 1024, 128)]
)
@pytest.mark.parametrize("rows", [1, 12, 17, 67, 300])
@pytest.mark.parametrize(
    ("bits", "form"), [(4, ""), (4, "zeros"), (4, "levels"), (8, ""), (8, "zeros")]
)
def test_products_are_those_of_rounded_numbers(flags, bits, form, width, depth, group, rows, built):
    torch.manual_seed(rows + depth)
    weight = random_weight(bits, width, depth, group, form)
    x, bias = torch.randn(rows, depth), torch.randn(width)
    found = PackedQuantised(built(flags), weight, bias, "pairs")(x)
    assert error(found, wanted(weight, x, bias)) < 4e-6


@WAYS
@pytest.mark.parametrize(("bits", "form"), [(4, ""), (4, "levels"), (8, "")])
def test_each_code_times_its_scale_is_rounded_once(flags, bits, form, built):
    weight = random_weight(bits, 40, 96, form=form)
    weight.scales[0] = 2.0**-24  # the smallest scale of all
    found = PackedQuantised(built(flags), weight, None, "pairs")(torch.eye(96))
    assert torch.equal(found, tensor(weight.dequantised()).bfloat16().float().T)


@BITS
@pytest.mark.parametrize("num_rows", [1, 64, 200, 300])
def test_threads_share_rows_or_columns_and_change_no_bit(bits, num_rows):
    packed = PackedQuantised(KERNELS, random_weight(bits, 97, 301), torch.randn(97), "pairs")
    x = torch.randn(num_rows, 301)
    found = [packed(x, threads) for threads in (1, 2, 3)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize(("bits", "row_bits"), [(8, 16), (8, 8), (4, 8)])
def test_few_rows_are_integers_and_many_are_bfloat16_where_tiles_are(bits, row_bits, built):
    kernels, weight = built(("-DSAGE_TILE_MODEL",)), random_weight(bits, 33, 96)
    for num_rows, form in ((15, row_bits), (16, "pairs")):
        x = torch.randn(num_rows, 96)
        chosen = PackedQuantised(kernels, weight, None, f"{row_bits}_many")(x)
        assert torch.equal(chosen, PackedQuantised(kernels, weight, None, form)(x))


PAIRS = pytest.mark.skipif(
    not (KERNELS and KERNELS.has_pairs) or platform.machine() in ("aarch64", "arm64"),
    reason="a CPU without bfloat16, or whose integers are faster",
)


@PAIRS
def test_a_program_multiplies_many_rows_in_bfloat16_and_few_as_integers(reference, paged):
    model, prompt = reference("qwen2"), [token % 97 for token in range(3, 103)]
    many = 16 if KERNELS._library.sage_has_tiles() else 64
    for num_rows, is_rounded in ((many - 1, False), (many, True)):
        found, exact = (
            paged(model, CpuBackend(), deterministic=exactly, quantization="int8").step(
                {"a": prompt[:num_rows]}
            )["a"]
            for exactly in (False, True)
        )
        assert torch.equal(found, exact) != is_rounded
        assert error(found, exact) < 0.03  # as far as int8 may be from the floats


@pytest.mark.parametrize(("bits", "row_bits"), [(8, 16), (8, 8), (4, 8)])
def test_plain_c_never_rounds_to_bfloat16(bits, row_bits, built):
    """It is slow there, so many rows are integers too."""
    weight, x = random_weight(bits, 33, 96), torch.randn(200, 96)
    chosen, integers = (
        PackedQuantised(built(()), weight, None, form)(x) for form in (f"{row_bits}_many", row_bits)
    )
    assert torch.equal(chosen, integers)


@PAIRS
def test_a_deterministic_program_never_rounds_to_bfloat16(reference, paged):
    """Its rows of a long prompt have the bits of rows that were computed one by one."""
    model, prompt = reference("qwen2"), [token % 97 for token in range(3, 150)]
    options = {"deterministic": True, "quantization": "int8"}
    whole = paged(model, CpuBackend(), **options).step({"a": prompt})["a"]
    alone = paged(model, CpuBackend(), **options)
    found = torch.cat([alone.step({"a": [token]})["a"] for token in prompt])
    assert torch.equal(found, whole)


@pytest.mark.soak
def test_the_code_for_amx_compiles(tmp_path):
    compile_for("sapphirerapids", "dequant.c", tmp_path)
