"""The instructions on tiles against Intel's definitions: on the model, and on a CPU with AMX."""

import ctypes
import signal
import subprocess

import numpy as np
import pytest
from tile_kernels import MODEL, WAYS, has_amx

from sagellm.backends.cpu.native import compiler
from sagellm.backends.cpu.native.library import open_kernels

SOURCE = """
#include "tiles.h"
#define DOT(name)                                                                             \\
    void name(const TileShapes *shapes, void *sums, const void *a, const void *b, long stride) { \\
        TILE_CONFIGURE(shapes);                                                               \\
        TILE_LOAD(0, sums, stride);                                                           \\
        TILE_LOAD(1, a, stride);                                                              \\
        TILE_LOAD(2, b, stride);                                                              \\
        TILE_##name(0, 1, 2);                                                                 \\
        TILE_STORE(0, sums, stride);                                                          \\
        TILE_RELEASE();                                                                       \\
    }
DOT(DOT_BF16)
DOT(DOT_SS)
DOT(DOT_SU)
DOT(DOT_US)
"""
STRIDE = 80  # bytes from row to row, more than a row has


class Shapes(ctypes.Structure):
    """TileShapes of tiles.h."""

    _fields_ = (
        ("palette", ctypes.c_uint8),
        ("rest", ctypes.c_uint8 * 15),
        ("bytes", ctypes.c_uint16 * 16),
        ("rows", ctypes.c_uint8 * 16),
    )

    def __init__(self, *tiles):
        super().__init__(palette=1)
        for number, (rows, num_bytes) in enumerate(tiles):
            self.rows[number], self.bytes[number] = rows, num_bytes


@pytest.fixture(scope="module", params=WAYS)
def tiles(request, tmp_path_factory):
    """The functions of SOURCE."""
    if not compiler.c_compiler():
        pytest.skip("no C compiler on this machine")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "dots.c").write_text(SOURCE)
    sources = [str(folder / "dots.c"), str(compiler._SOURCES / "tiles.c")]
    how = MODEL if request.param == "model" else ("-march=native", "-O1")
    command = [*compiler.c_compiler(), "-shared", "-fPIC", "-Wno-psabi", *how]
    include = f"-I{compiler._SOURCES}"
    library = str(folder / "dots.so")
    subprocess.run([*command, include, "-o", library, *sources], check=True)
    loaded = ctypes.CDLL(library)
    assert loaded.sage_has_tiles()
    return loaded


def memory(rows, dtype=np.uint8):
    """Rows in memory, STRIDE bytes apart; what lies between them is 0x7f."""
    around = np.full((16, STRIDE), 0x7F, np.uint8)
    around[: len(rows), : rows[0].nbytes] = rows.view(np.uint8).reshape(len(rows), -1)
    return around


def run(function, shapes, sums, a, b):
    places = [memory(part) for part in (sums, a, b)]
    function(ctypes.byref(shapes), *(p.ctypes.data_as(ctypes.c_void_p) for p in places), STRIDE)
    rest = places[0].copy()
    rest[: len(sums), : sums[0].nbytes] = 0x7F
    assert (rest == 0x7F).all()
    return places[0][: len(sums), : sums[0].nbytes].copy().view(sums.dtype)


def bfloat(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


SHAPES = pytest.mark.parametrize(("rows", "depth", "cols"), [(16, 16, 16), (5, 3, 7), (1, 16, 2)])


@SHAPES
def test_products_of_bfloat16(tiles, rows, depth, cols):
    random = np.random.default_rng(1)
    a = bfloat(random.normal(size=(rows, 2 * depth)))
    b = bfloat(random.normal(size=(depth, 2 * cols)))
    sums = random.normal(size=(rows, cols)).astype(np.float32)
    wanted = [np.zeros((rows, cols), np.float32) for _ in "eo"]
    for k in range(depth):
        for odd in (0, 1):
            wanted[odd] += wide(a[:, 2 * k + odd])[:, None] * wide(b[k, odd::2])
    shapes = Shapes((rows, 4 * cols), (rows, 4 * depth), (depth, 4 * cols))
    found = run(tiles.DOT_BF16, shapes, sums, a, b)
    assert (found == sums + (wanted[0] + wanted[1])).all()


def test_numbers_below_the_least_normal_one_are_zeros(tiles):
    tiny, one = 2.0**-127, 1.0
    shapes = Shapes((4, 4), (4, 4), (1, 4))
    sums = np.array([[0.0], [tiny], [0.0], [0.0]], np.float32)
    a = bfloat([[tiny, 0.0], [0.0, 0.0], [2.0**-70, 0.0], [2.0**-126, 0.0]])
    found = run(tiles.DOT_BF16, shapes, sums, a, bfloat([[one, one]]))
    assert found[:, 0].tolist() == [0.0, 0.0, 2.0**-70, 2.0**-126]
    found = run(tiles.DOT_BF16, shapes, sums, a, bfloat([[2.0**-70, 1.0]]))
    assert not found.any()


@pytest.mark.parametrize(
    ("name", "left", "right"), [("SS", "i", "i"), ("SU", "i", "u"), ("US", "u", "i")]
)
@SHAPES
def test_products_of_bytes(tiles, name, left, right, rows, depth, cols):
    random = np.random.default_rng(1)
    a = random.integers(0, 256, (rows, 4 * depth)).astype(np.uint8).view(f"{left}1")
    b = random.integers(0, 256, (depth, 4 * cols)).astype(np.uint8).view(f"{right}1")
    sums = random.integers(-9, 9, (rows, cols)).astype(np.int32)
    columns = b.reshape(depth, cols, 4).transpose(0, 2, 1).reshape(4 * depth, cols)
    shapes = Shapes((rows, 4 * cols), (rows, 4 * depth), (depth, 4 * cols))
    found = run(tiles[f"DOT_{name}"], shapes, sums, a, b)
    assert (found == sums + a.astype(np.int32) @ columns.astype(np.int32)).all()


def test_sums_of_bytes_wrap_around(tiles):
    most = np.full((1, 1), 2**31 - 1, np.int32)
    found = run(tiles.DOT_SS, Shapes((1, 4), (1, 4), (1, 4)), most, *[np.ones((1, 4), np.int8)] * 2)
    assert found.item() == -(2**31) + 3


@pytest.mark.parametrize(
    "misuse",
    [
        "tiles_end(); TILE_ZERO(0);",
        "shapes.rows[9] = 1, shapes.bytes[9] = 4; TILE_CONFIGURE(&shapes);",
        "shapes.bytes[1] = 32; TILE_CONFIGURE(&shapes); TILE_DOT_BF16(0, 1, 2);",
        "shapes.rows[1] = 15; TILE_CONFIGURE(&shapes); TILE_DOT_SS(0, 1, 2);",
        "TILE_DOT_BF16(0, 1, 1);",
    ],
)
def test_the_model_stops_where_the_cpu_would(tmp_path, misuse):
    if not compiler.c_compiler():
        pytest.skip("no C compiler on this machine")
    start = "TileShapes shapes = {.palette = 1}; tiles_begin(); shapes = model_shapes;"
    body = f"{start} if (count > 1) {{ {misuse} }}"
    (tmp_path / "main.c").write_text(f'#include "tiles.h"\nint main(int count) {{ {body} }}')
    program = str(tmp_path / "main")
    flags = (*MODEL, "-Wno-psabi", f"-I{compiler._SOURCES}", "-o", program)
    subprocess.run([*compiler.c_compiler(), *flags, str(tmp_path / "main.c")], check=True)
    assert subprocess.run([program]).returncode == 0
    assert subprocess.run([program, "misuse"]).returncode == -signal.SIGILL


@pytest.mark.parametrize("source", sorted(path.name for path in compiler._SOURCES.glob("*.c")))
def test_the_code_for_amx_compiles(tmp_path, source):
    """On a CPU without AMX, nothing else reads the intrinsics."""
    command = [*compiler.c_compiler(), "-march=sapphirerapids", "-O1", "-c"]
    (tmp_path / "probe.c").write_text("int sagellm;")
    target = ["-o", str(tmp_path / "out.o")]
    probe = [*command, str(tmp_path / "probe.c"), *target]
    if not compiler.c_compiler() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no compiler for Sapphire Rapids")
    flags = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off")
    done = subprocess.run(
        [*command, *flags, str(compiler._SOURCES / source), *target], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_machine_without_amx_refuses_tiles(monkeypatch, tmp_path):
    """A library whose kernels could use tiles asks the operating system first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "_FLAGS", ("-O1", "-pthread", "-shared", "-fPIC", "-Wno-psabi"))
    kernels = open_kernels(flags=("-march=native", "-mamx-tile", "-mamx-bf16", "-mamx-int8"))
    if kernels is None:
        pytest.skip("no C compiler that knows AMX")
    assert kernels.has_tiles == has_amx()
    kernels.function("sage_multiply_tiles")  # is there, though it is not used
