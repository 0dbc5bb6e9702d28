"""Tuned numbers: no result depends on them, and a file that is not as written is ignored."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from logged import logged

from sagellm.backends.arrays import Floats, to_bfloat16
from sagellm.backends.cpu.linear import pack
from sagellm.backends.cpu.native.compiler import compiled
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.native.tuning import (
    Tuned,
    Tuning,
    default_threads,
    forget_tuned,
    read_tuned,
    tuned_file,
    write_tuned,
)
from sagellm.backends.cpu.quantised_linear import PackedQuantised, quantise
from sagellm.backends.cpu.topology import CpuTopology
from sagellm.backends.cpu.tuner import NUMBERS

KERNELS = native_kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
TUNED = Tuned(
    Tuning(rows=32, panels=2, ahead=512, quant_ahead=1024), threads=2, cores=2, cpus=4, allowed=4
)
FITTING = CpuTopology(((0, 2), (1, 3)))


@pytest.fixture
def kernels() -> Iterator[NativeKernels]:
    """The kernels, which have their defaults again after the test."""
    assert KERNELS is not None
    yield KERNELS
    KERNELS.tuning.use(KERNELS.tuning.default)


def noise(*shape: int) -> Floats:
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def every_tuning(default: Tuning) -> Iterator[Tuning]:
    """The default with each candidate of `sagellm tune`, all smallest and largest candidates
    together, and the smallest values that kernels take.
    """
    by_name = {number.name: number.candidates for number in NUMBERS}
    for name, candidates in by_name.items():
        for value in candidates:
            yield msgspec.structs.replace(default, **{name: value})
    ends = [(min(by_name[name]), max(by_name[name])) for name in Tuning.__struct_fields__]
    for values in itertools.product(*ends):
        yield Tuning(*values)
    yield Tuning(rows=1, panels=1, ahead=512, quant_ahead=512)


@needs_kernels
@pytest.mark.parametrize("kind", ["float", "bfloat", "pairs"])
def test_a_product_has_the_same_bits_with_every_tuning(kernels: NativeKernels, kind: str) -> None:
    weight = noise(5 * 32 + 7, 4101)
    weight = weight if kind == "float" else to_bfloat16(weight)
    linear = pack(kernels, weight, noise(len(weight)), kind)  # type: ignore[arg-type]
    rows = [noise(count, 4101) for count in (1, 2, 65, 150)]
    wanted = [linear(x) for x in rows]
    for values in every_tuning(kernels.tuning.default):
        assert kernels.tuning.use(values)
        assert all(map(np.array_equal, map(linear, rows), wanted)), values


@needs_kernels
@pytest.mark.parametrize(("bits", "row_bits"), [(8, 16), (8, 8), (4, 16), (4, 8)])
def test_a_quantised_product_has_the_same_bits_with_every_tuning(
    kernels: NativeKernels, bits: int, row_bits: int
) -> None:
    weight = quantise(kernels, noise(3 * 32 + 7, 2080), bits)
    linear = PackedQuantised(kernels, weight, None, row_bits)
    rows = [noise(count, 2080) for count in (1, 70)]
    wanted = [linear(x) for x in rows]
    for values in every_tuning(kernels.tuning.default):
        assert kernels.tuning.use(values)
        assert all(map(np.array_equal, map(linear, rows), wanted)), values


@needs_kernels
@pytest.mark.parametrize(
    "changed",
    [
        *({"rows": 0}, {"rows": 65}, {"panels": 0}, {"panels": 3}, {"panels": 8}),
        *({"ahead": 0}, {"ahead": 513}, {"ahead": (256 << 10) + 512}),
        *({"quant_ahead": 0}, {"quant_ahead": 1025}, {"quant_ahead": (256 << 10) + 512}),
    ],
)
def test_a_value_out_of_range_is_refused(kernels: NativeKernels, changed: dict[str, int]) -> None:
    linear, rows = pack(kernels, noise(64, 64), None), noise(100, 64)
    wanted = linear(rows)
    assert not kernels.tuning.use(msgspec.structs.replace(kernels.tuning.default, **changed))
    assert np.array_equal(linear(rows), wanted)


def write(tmp_path: Path, text: str = "") -> Path:
    """A library in a folder of its own, with a file of what was tuned: `text`, or TUNED."""
    folder = tmp_path / "native"
    folder.mkdir(mode=0o700)
    library = folder / "kernels-0123.so"
    file = write_tuned(library, TUNED)
    if text:
        file.write_text(text)
    return library


def test_what_is_written_is_read(tmp_path: Path) -> None:
    library = write(tmp_path)
    with logged() as logs:
        assert read_tuned(library) == TUNED
    assert logs == []
    assert tuned_file(library).name == "tuned-0123.json"
    assert tuned_file(library).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in library.parent.iterdir()] == ["tuned-0123.json"]


def test_another_library_has_another_file(tmp_path: Path) -> None:
    """So what was tuned for other sources, or for another CPU, is never used."""
    library = write(tmp_path)
    with logged() as logs:
        assert read_tuned(library.with_name("kernels-4567.so")) is None
    assert logs == []


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"threads": 2}', "\0\xff"),
        msgspec.json.encode(TUNED).decode().replace("1024", '"many"'),
        msgspec.json.encode(TUNED).decode().replace('"threads":2', '"threads":0'),
        msgspec.json.encode(TUNED).decode().replace('"cores"', '"kernels":1,"cores"'),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(tmp_path: Path, text: str) -> None:
    library = write(tmp_path, text)
    with logged() as logs:
        assert read_tuned(library) is None
    assert [(log["event"], log["log_level"]) for log in logs] == [("tuning_ignored", "warning")]
    assert logs[0]["file"] == str(tuned_file(library))


@pytest.mark.parametrize("planted", ["writable", "a link", "of another user", "a folder"])
def test_what_others_could_have_written_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    library = write(tmp_path)
    file = tuned_file(library)
    if planted == "writable":
        file.chmod(0o666)
    elif planted == "a link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").chmod(0o666)
    elif planted == "of another user":
        owner = file.stat().st_uid
        monkeypatch.setattr("os.getuid", lambda: owner + 1)
    else:
        file.unlink()
        file.mkdir(mode=0o700)
    with logged() as logs:
        assert read_tuned(library) is None
    assert [log["event"] for log in logs] == ["tuning_ignored"]


def test_what_was_tuned_is_forgotten_once(tmp_path: Path) -> None:
    library = write(tmp_path)
    assert forget_tuned(library)
    assert read_tuned(library) is None
    assert not forget_tuned(library)


@needs_kernels
def test_kernels_use_what_was_tuned(tmp_path: Path) -> None:
    path = compiled()
    assert path is not None
    library = write(tmp_path)
    library.write_bytes(path.read_bytes())  # with values of its own, apart from other tests
    kernels = NativeKernels(library)
    assert kernels.tuning.tuned == TUNED
    assert kernels.tuning.used == TUNED.values
    assert kernels.tuning.default == KERNELS.tuning.default  # type: ignore[union-attr]


@needs_kernels
def test_a_file_with_values_that_kernels_refuse_is_ignored_with_a_warning(tmp_path: Path) -> None:
    path = compiled()
    assert path is not None
    library = write(tmp_path)
    library.write_bytes(path.read_bytes())
    values = Tuning(rows=65, panels=4, ahead=4096, quant_ahead=4096)
    write_tuned(library, msgspec.structs.replace(TUNED, values=values))
    with logged() as logs:
        kernels = NativeKernels(library)
    assert (kernels.tuning.tuned, kernels.tuning.used) == (None, kernels.tuning.default)
    assert [log["event"] for log in logs] == ["tuning_ignored"]


@pytest.mark.parametrize(
    ("omp", "tuned", "topology", "threads"),
    [
        ("", None, FITTING, 2),
        ("", TUNED, FITTING, 2),
        ("", msgspec.structs.replace(TUNED, threads=4), FITTING, 4),
        ("", msgspec.structs.replace(TUNED, threads=4), CpuTopology(((0, 2),)), 1),
        ("", msgspec.structs.replace(TUNED, threads=4), CpuTopology(((0, 2), (1, 3)), 1.0), 1),
        ("", msgspec.structs.replace(TUNED, threads=5), FITTING, 2),
        ("3", msgspec.structs.replace(TUNED, threads=4), FITTING, 3),
        ("3", None, FITTING, 3),
    ],
)
def test_the_users_threads_win_then_the_tuned_ones_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
    omp: str,
    tuned: Tuned | None,
    topology: CpuTopology,
    threads: int,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert default_threads(tuned, topology) == threads
