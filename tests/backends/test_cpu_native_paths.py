"""Every way through the C kernels, by instruction set: right, and with nearly every line run.

`make test` takes the paths that this machine's CPU runs. `make soak` takes the others too, under an
emulator or with the model of tiles, which is slow, and all of them with the product's flags.
"""

import shutil
import sys

import pytest
from native_kernels.calls import Calls
from native_kernels.coverage import Coverage, measured, table
from native_kernels.paths import PATHS, KernelPath

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the driver is linked for Linux")
LEAST_PERCENT = 98


def skip_without_tools(path):
    if path.missing:
        pytest.skip(f"{path.name} cannot run here: {path.missing}")


HERE = [path for path in PATHS if path.is_here and not path.has_tiles]
ELSEWHERE = [path for path in PATHS if path not in HERE]


@pytest.mark.parametrize(
    "path",
    [
        *(pytest.param(path, id=path.name) for path in HERE),
        *(pytest.param(path, id=path.name, marks=pytest.mark.soak) for path in ELSEWHERE),
    ],
)
@pytest.mark.timeout(900)
def test_every_kernel_is_right_and_its_lines_run(path, tmp_path):
    skip_without_tools(path)
    failures, coverage = measured(path, tmp_path)
    assert failures == []
    assert coverage.percent >= LEAST_PERCENT, coverage.missed_lines()


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_it_is_right_as_the_product_compiles_it(path, tmp_path):
    skip_without_tools(path)
    assert list(path.failures(path.build(tmp_path), tmp_path)) == []


def test_a_path_says_which_packages_it_needs(monkeypatch):
    found = {tool: tool for tool in ("qemu-aarch64", "gcc", "gcov")}
    monkeypatch.setattr(shutil, "which", found.get)
    monkeypatch.setattr("native_kernels.paths.MACHINE", "x86_64")
    path = KernelPath("NEON", "aarch64", (), "asimd", "max")
    assert path.missing == "apt-get install gcc-aarch64-linux-gnu"
    found.clear()
    assert path.missing == "apt-get install gcc-aarch64-linux-gnu qemu-user"
    assert KernelPath("AVX9", "x86_64", (), "avx9").missing == "a CPU with avx9"


def test_an_array_of_a_case_ends_where_it_says():
    calls = Calls("of two arrays")
    first, second = calls.array([1.0]), calls.array([2.0, 3.0])
    assert (first.number, second.at(8).offset) == (0, 8)
    assert [size for _, size, _ in calls.blobs] == [8, 16]


def test_the_table_has_a_row_for_each_file_and_a_column_for_each_path():
    one = Coverage({"a.c": 4, "b.h": 2}, {"a.c": [3], "b.h": []})
    two = Coverage({"a.c": 4}, {"a.c": []})
    assert table({"one": one, "two": two}).splitlines()[2:] == [
        "| a.c | 75 | 100 |",
        "| b.h | 100 |  |",
        "| lines | 6 | 4 |",
        "| covered, % | 83.3 | 100.0 |",
    ]
