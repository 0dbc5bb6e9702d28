"""Products by tiles: torch's numbers at awkward shapes, and where tiles are chosen."""

import ctypes

import pytest
import torch
from tile_kernels import MODEL, WAYS, kernels_by

from sagellm.backends.cpu import linear as packing
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import open_kernels
from sagellm.backends.cpu.torch_linear import array

SHAPES = pytest.mark.parametrize(
    ("width", "depth"),
    [(1, 8), (7, 77), (33, 33), (64, 896), (150, 31), (32, 4864), (65, 2081)],
)
FEWEST = 4  # rows that tiles multiply


@pytest.fixture(params=WAYS)
def kernels(request):
    torch.manual_seed(3)
    return kernels_by(request.param)


def operands(rows, width, depth):
    return torch.randn(rows, depth), torch.randn(width, depth).bfloat16(), torch.randn(width)


class Product:
    """A PackedLinear on tensors."""

    def __init__(self, made):
        self.made, self.address = made, made.address

    def __call__(self, rows, threads=1):
        return torch.from_numpy(self.made(array(rows), threads))


def pack(kernels, weight, bias, kind, tiles=False):
    offset = None if bias is None else array(bias)
    return Product(packing.pack(kernels, array(weight), offset, kind, 2, tiles=tiles))


def tiled(kernels, weight, bias):
    found = pack(kernels, weight, bias, "pairs", tiles=True)
    assert NativeLinear.from_address(found.address).run == kernels.function("sage_multiply_tiles")
    return found


@SHAPES
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_any_number_of_rows(kernels, width, depth, bias):
    x, weight, offset = operands(530, width, depth)
    multiply = tiled(kernels, weight, offset if bias else None)
    wanted = x.bfloat16().double() @ weight.double().T + (offset if bias else 0.0)
    for rows in [*range(71), 96, 97, 256, 257, 300, 530]:
        found = multiply(x[:rows]).double()
        assert torch.allclose(found, wanted[:rows], atol=2e-4, rtol=1e-5), rows


@SHAPES
def test_a_row_has_the_same_bits_in_any_batch_that_tiles_take(kernels, width, depth):
    x, weight, bias = operands(203, width, depth)
    multiply = tiled(kernels, weight, bias)
    whole = multiply(x)
    for size in (4, 7, 9, 15, 16, 17, 31, 33, 50, 100):
        parts = [part for part in torch.split(x, size) if len(part) >= FEWEST]
        found = torch.cat([multiply(part) for part in parts])
        assert torch.equal(found, whole[: len(found)]), size


def test_few_rows_have_the_bits_of_vectors(kernels):
    x, weight, bias = operands(FEWEST, 70, 600)
    multiply, vectors = tiled(kernels, weight, bias), pack(kernels, weight, bias, "pairs")
    for rows in range(FEWEST):
        assert torch.equal(multiply(x[:rows]), vectors(x[:rows]))
    assert not torch.equal(multiply(x), vectors(x))


@pytest.mark.parametrize("rows", [8, 40, 300, 600])
def test_a_product_has_the_same_bits_on_any_number_of_threads(kernels, rows):
    x, weight, bias = operands(rows, 149, 700)
    multiply = tiled(kernels, weight, bias)
    alone = multiply(x, 1)
    for threads in (2, 3, 5, 13):
        assert torch.equal(multiply(x, threads), alone), threads


def test_strided_rows_and_what_lies_beside_the_columns_of_out(kernels):
    x, weight, bias = operands(29, 53, 600)
    multiply, around = tiled(kernels, weight, bias), torch.full((31, 80), 7.0)
    wide = torch.randn(29, 640)
    wide[:, 8:608] = x
    place = (wide[:, 8:].data_ptr(), 640, around[1:, 8:].data_ptr(), 80)
    kernels._library.sage_linear(multiply.address, *place, 29, 2)
    assert torch.equal(around[1:30, 8:61], multiply(x))
    around[1:30, 8:61] = 7.0
    assert (around == 7.0).all()


def test_numbers_that_are_none_reach_their_own_row_and_column_alone(kernels):
    x, weight, bias = operands(19, 20, 40)
    usual = tiled(kernels, weight, bias)(x)
    x[4, 3], weight[6, 39] = float("nan"), float("inf")
    found = tiled(kernels, weight, bias)(x)
    spared = torch.ones(19, 20, dtype=torch.bool)
    spared[4], spared[:, 6] = False, False
    assert torch.equal(found[spared], usual[spared])
    assert not found[~spared].isfinite().any()


@pytest.mark.soak
def test_the_model_needs_no_avx512(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = open_kernels(flags=(*MODEL, "-march=x86-64-v3"))
    if other is None or not torch.cpu._is_avx2_supported():
        pytest.skip("no C compiler for AVX2, or no CPU with it")
    x, weight, bias = operands(40, 150, 513)
    wanted = x.bfloat16().double() @ weight.double().T + bias
    assert torch.allclose(tiled(other, weight, bias)(x).double(), wanted, atol=2e-4)


SHARE = ctypes.CFUNCTYPE(  # `multiply` of linear.h
    *(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long),
    *(ctypes.c_long, ctypes.c_int, ctypes.c_int),
)


def gated(multiply, x, width, threads):
    """The result of the gated kernel, in columns 1 to width + 1 of a wider matrix."""
    out = torch.full((len(x), width + 3), torch.nan)
    run = SHARE(NativeLinear.from_address(multiply.address).gated)
    for number in range(threads):
        sizes = x.stride(0), out[:, 1:].data_ptr(), out.stride(0), len(x)
        run(multiply.address, x.data_ptr(), *sizes, number, threads)
    assert torch.isnan(out[:, [0, -2, -1]]).all()
    return out[:, 1 : width + 1]


@pytest.mark.parametrize("depth", [1, 513, 4101, 17000])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_is_what_the_halves_of_the_columns_give(kernels, depth, bias):
    x, weight, offset = operands(290, 2 * 96, depth)
    multiply = tiled(kernels, weight, offset if bias else None)
    gate, up = multiply(x).split(96, 1)
    if depth > 16384:  # more than the kernel's memory holds: vectors multiply
        gate, up = pack(kernels, weight, offset if bias else None, "pairs")(x).split(96, 1)
    wanted = torch.from_numpy(kernels.silu_mul(array(gate), array(up), 1))
    for rows, threads in [(8, 1), (13, 4), (33, 2), (48, 1), (101, 5), (256, 2), (290, 2)]:
        assert torch.equal(gated(multiply, x[:rows], 96, threads), wanted[:rows]), rows


@pytest.mark.parametrize(
    ("tiles", "dtype", "way"),
    [
        (True, torch.bfloat16, "tiles"),
        (False, torch.bfloat16, "pairs"),
        (True, torch.float32, "float"),
    ],
)
def test_tiles_multiply_bfloat16_where_they_may(kernels, tiles, dtype, way):
    if not kernels.has_pairs:
        pytest.skip("a CPU that multiplies no pairs of bfloat16")
    weight = array(torch.randn(64, 3).to(dtype))
    found = packing.pack(kernels, weight, None, tiles=tiles)
    struct = NativeLinear.from_address(found.address)
    assert struct.run == kernels.function(f"sage_multiply_{way}")
    assert struct.gated == kernels.function(f"sage_gated_{way}")
