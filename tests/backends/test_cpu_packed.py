"""Weights in panels: torch's numbers at awkward shapes, the same bits for any batch and threads."""

import ctypes
import gc
import itertools

import numpy as np
import pytest
import torch

from sagellm.backends.cpu import linear as packing
from sagellm.backends.cpu.linear import PackedLinear, PackingQueue
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.native.tuning import Tuning
from sagellm.backends.cpu.torch_linear import array
from sagellm.backends.interface import LoweringError

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
KINDS = pytest.mark.parametrize("kind", ["float", "bfloat", "pairs"])
SHAPES = pytest.mark.parametrize(
    ("width", "depth"), [(1, 8), (7, 77), (16, 1), (48, 513), (64, 1024), (33, 2061), (150, 30)]
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


class Product:
    """A PackedLinear on tensors."""

    def __init__(self, made):
        self.made = made
        self.address, self.shape = made.address, made.shape

    def __call__(self, rows, threads=1):
        return torch.from_numpy(self.made(array(rows), threads))


def pack(weight, bias, kind=None, threads=1):
    offset = None if bias is None else array(bias)
    return Product(packing.pack(KERNELS, array(weight), offset, kind, threads))


def operands(rows, width, depth, kind):
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    return torch.randn(rows, depth), torch.randn(width, depth).to(dtype), torch.randn(width)


@KINDS
@SHAPES
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_any_number_of_rows(kind, width, depth, bias):
    x, weight, offset = operands(230, width, depth, kind)
    linear = pack(weight, offset if bias else None, kind)
    seen = x.bfloat16() if kind == "pairs" else x
    wanted = seen.double() @ weight.double().T + (offset if bias else 0.0)
    for rows in [*range(71), 96, 97, 192, 193, 230]:
        found = linear(x[:rows]).double()
        assert torch.allclose(found, wanted[:rows], atol=2e-4, rtol=1e-5), rows


@KINDS
@SHAPES
def test_a_row_has_the_same_bits_in_any_batch(kind, width, depth):
    x, weight, bias = operands(203, width, depth, kind)
    linear = pack(weight, bias, kind)
    whole = linear(x)
    for size in (1, 2, 3, 4, 5, 6, 7, 9, 16, 50, 100):
        parts = [linear(part) for part in torch.split(x, size)]
        assert torch.equal(torch.cat(parts), whole), size


@KINDS
@pytest.mark.parametrize("rows", [1, 2, 5, 40, 300])
def test_a_product_has_the_same_bits_on_any_number_of_threads(kind, rows):
    x, weight, bias = operands(rows, 149, 700, kind)
    alone = pack(weight, bias, kind)(x)
    for number in (2, 3, 5, 13):
        assert torch.equal(pack(weight, bias, kind, number)(x, number), alone), number


@KINDS
@pytest.mark.parametrize("rows", [1, 2, 6, 29])
def test_strided_rows(kind, rows):
    x, weight, bias = operands(rows, 21, 16, kind)
    wide = torch.randn(rows, 40)
    wide[:, 8:24] = x
    linear = pack(weight, bias, kind)
    assert torch.equal(linear(wide[:, 8:24]), linear(x))


@KINDS
def test_what_lies_beside_the_columns_of_out_stays(kind):
    x, weight, bias = operands(8, 21, 600, kind)
    linear, around = pack(weight, bias, kind), torch.full((8, 40), 7.0)
    arguments = (x.data_ptr(), 600, around[:, 8:].data_ptr(), 40)
    for rows in (1, 2, 8):
        KERNELS._library.sage_linear(linear.address, *arguments, rows, 2)
        assert torch.equal(around[:rows, 8:29], linear(x[:rows]))
    around[:, 8:29] = 7.0
    assert (around == 7.0).all()


@KINDS
def test_numbers_that_are_none_reach_their_own_row_and_column_alone(kind):
    x, weight, bias = operands(9, 20, 40, kind)
    usual = pack(weight, bias, kind)(x)
    x[4, 3], weight[6, 5] = float("nan"), float("inf")
    found = pack(weight, bias, kind)(x)
    spared = torch.ones(9, 20, dtype=torch.bool)
    spared[4], spared[:, 6] = False, False
    assert torch.equal(found[spared], usual[spared])
    assert not found[~spared].isfinite().any()


SHARE = ctypes.CFUNCTYPE(  # `multiply` of linear.h
    *(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_long),
    *(ctypes.c_long, ctypes.c_int, ctypes.c_int),
)
LOOK_UP = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)  # of linear.h


def gated(linear, x, width, threads):
    """The result of the gated kernel, in columns 1 to width + 1 of a wider matrix."""
    out = torch.full((len(x), width + 3), torch.nan)
    multiply = SHARE(NativeLinear.from_address(linear.address).gated)
    for number in range(threads):
        place = out.data_ptr() + out.element_size()
        sizes = x.stride(0), place, out.stride(0), len(x)
        multiply(linear.address, x.data_ptr(), *sizes, number, threads)
    assert torch.isnan(out[:, [0, -2, -1]]).all()
    return out[:, 1 : width + 1]


@KINDS
@pytest.mark.parametrize("depth", [1, 513, 2048, 4101])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_is_what_the_halves_of_the_columns_give(kind, depth, bias):
    x, weight, offset = operands(260, 2 * 96, depth, kind)
    linear = pack(weight, offset if bias else None, kind)
    gate, up = linear(x).split(96, 1)
    wanted = torch.from_numpy(KERNELS.silu_mul(array(gate), array(up), 1))
    for rows, threads in [
        (1, 1),
        (1, 2),
        (2, 3),
        (5, 2),
        (13, 4),
        (48, 1),
        (49, 2),
        (101, 5),
        (260, 2),
    ]:
        assert torch.equal(gated(linear, x[:rows], 96, threads), wanted[:rows]), rows


@KINDS
def test_a_gated_product_has_the_same_bits_with_every_tuning(kind):
    x, weight, _ = operands(150, 2 * 96, 2061, kind)
    linear, default = pack(weight, None, kind), KERNELS.tuning.default
    wanted = {rows: gated(linear, x[:rows], 96, 2) for rows in (1, 2, 65, 150)}
    try:
        for panels, most, ahead in itertools.product((1, 2, 4), (1, 24, 64), (512, 1 << 18)):
            assert KERNELS.tuning.use(Tuning(most, panels, ahead, default.quant_ahead))
            for rows, result in wanted.items():
                assert torch.equal(gated(linear, x[:rows], 96, 2), result)
    finally:
        KERNELS.tuning.use(default)


@pytest.mark.parametrize(("width", "depth"), [(2 * 95, 64), (2 * 16 + 2, 64), (128, 1 << 20)])
def test_a_shape_without_a_gated_kernel_has_none(width, depth):
    assert not KERNELS.is_gated(width, depth)
    if depth == 64:
        linear = pack(torch.randn(width, depth), None, "float")
        assert NativeLinear.from_address(linear.address).gated is None


def test_the_struct_names_what_the_c_kernels_read():
    weight, bias = torch.randn(5, 3), torch.randn(5)
    linear = pack(weight, bias)
    found = NativeLinear.from_address(linear.address)
    assert (found.num_cols, found.k, found.group) == (*linear.shape, 0)
    assert (found.scales, found.zeros, found.bias) == (None, None, bias.data_ptr())
    assert found.run == ctypes.cast(KERNELS._library.sage_multiply_float, ctypes.c_void_p).value


@KINDS
@SHAPES
def test_a_row_of_a_packed_weight_has_the_bits_that_were_packed(kind, width, depth):
    _, weight, _ = operands(1, width, depth, kind)
    linear = pack(weight, None, kind)
    look_up = LOOK_UP(NativeLinear.from_address(linear.address).row)
    for row in range(width):
        found = torch.full((depth + 1,), 7.0)
        look_up(linear.address, row, found.data_ptr())
        assert torch.equal(found[:depth], weight[row].float()), row
        assert found[depth] == 7.0


def test_what_a_struct_points_to_lives_as_long_as_it():
    weight = torch.randn(300, 100)
    wanted = torch.randn(4, 100)
    linear = pack(weight.clone(), torch.zeros(300))
    gc.collect()
    rubbish = [torch.full((300, 100), 9.0) for _ in range(8)]
    assert torch.allclose(linear(wanted), wanted @ weight.T, atol=1e-4)
    assert len(rubbish) == 8


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="sage_multiply_nothing"):
        PackedLinear(KERNELS, "sage_multiply_nothing", np.zeros(1), (1, 1))


@pytest.mark.parametrize(("has_pairs", "kernel"), [(True, "pairs"), (False, "bfloat")])
def test_bfloat16_is_multiplied_in_pairs_where_the_cpu_can(monkeypatch, has_pairs, kernel):
    monkeypatch.setattr(type(KERNELS), "has_pairs", has_pairs)
    linear = pack(torch.randn(5, 3).bfloat16(), None)
    chosen = KERNELS.function(f"sage_multiply_{kernel}")
    assert NativeLinear.from_address(linear.address).run == chosen


class OneFile:
    """Weights of one file. `reports`: the bytes that were read, as they were reported."""

    def __init__(self, file, weights):
        self.file = file
        self.reports = []
        places = itertools.accumulate((weight.nbytes for weight in weights), initial=7)
        self.places = {id(weight): place for weight, place in zip(weights, places, strict=False)}

    def file_place(self, weight):
        place = self.places.get(id(weight))
        return None if place is None else (self.file.fileno(), place)

    def count_read(self, num_bytes):
        self.reports.append(num_bytes)


def packed_alone(weight, kind):
    queue = PackingQueue(KERNELS, 1)
    packed = queue.add([weight], kind)
    queue.run()
    return packed


def random_weights(kind, *shapes):
    return [array(operands(1, *shape, kind)[1]) for shape in shapes]


@KINDS
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_weights_in_files_and_in_memory_are_packed_together(kind, threads, tmp_path):
    weights = random_weights(kind, (2100, 513), (33, 77), (1, 1), (300, 70_000 // 300))
    in_memory = random_weights(kind, (130, 40), (600, 600))
    content = b"".join([b"offset.", *(weight.tobytes() for weight in weights)])
    (tmp_path / "weights").write_bytes(content)
    with (tmp_path / "weights").open("rb") as file:
        files = OneFile(file, weights)
        queue = PackingQueue(KERNELS, threads, files)
        copies = [queue.add([weight], kind) for weight in (*weights, *in_memory)]
        blank = [np.zeros_like(weight) for weight in weights]  # files are read, not these arrays
        for weight, nothing in zip(weights, blank, strict=True):
            weight[...], nothing[...] = nothing, weight.copy()
        queue.run()
    for found, weight in zip(copies, [*blank, *in_memory], strict=True):
        assert found.tobytes() == packed_alone(weight, kind).tobytes()
    assert files.reports == [0, len(content) - 7]


@KINDS
@pytest.mark.parametrize("rows", [(64, 128, 33), (64, 31), (31, 64), (7, 8, 9)])
def test_parts_of_a_weight_are_packed_as_the_whole(kind, rows):
    parts = random_weights(kind, *((num, 77) for num in rows))
    queue = PackingQueue(KERNELS, 2)
    found = queue.add(parts, kind)
    queue.run()
    assert found.tobytes() == packed_alone(np.concatenate(parts), kind).tobytes()


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    (weight,) = random_weights("pairs", (500, 500))
    (tmp_path / "weights").write_bytes(b"offset." + weight.tobytes()[:-2])
    with (tmp_path / "weights").open("rb") as file:
        queue = PackingQueue(KERNELS, 2, OneFile(file, [weight]))
        queue.add([weight], "pairs")
        with pytest.raises(LoweringError, match="the weights cannot be read: Input/output error"):
            queue.run()


@pytest.mark.parametrize("limit", ["_MOST_COPIED", "_MOST_STORED"])
def test_few_bytes_wait(limit, monkeypatch, tmp_path):
    weights = random_weights("float", (64, 10), (64, 10), (64, 10))
    monkeypatch.setattr(packing, limit, 2 * weights[0].nbytes)
    (tmp_path / "weights").write_bytes(b"offset." + b"".join(map(bytes, weights)))
    with (tmp_path / "weights").open("rb") as file:
        queue = PackingQueue(KERNELS, 1, OneFile(file, weights if "STORED" in limit else []))
        copies = [queue.add([weight], "float") for weight in weights]
        wanted = [packed_alone(weight, "float").tobytes() for weight in weights]
        assert [copy.tobytes() for copy in copies[:2]] == wanted[:2]
        assert copies[2].tobytes() != wanted[2]
        queue.run()
    assert copies[2].tobytes() == wanted[2]
