"""The C kernels against their torch definitions, at sizes that leave remainders everywhere."""

import pytest
import torch
import torch.nn.functional as F
from logged import logged

from sagellm.backends.cpu.native import compiler, library
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.torch_linear import array

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


@pytest.mark.parametrize(("width", "size"), [(40, 40), (36, 12), (13, 13)])
def test_rms_norm_alone_and_behind_an_add(width, size):
    a, b, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(size)
    runs = (a + b).view(5, -1, size)
    wanted = F.rms_norm(runs, (size,), weight, 1e-5).flatten(1)
    how = array(weight), size, 1e-5, 1
    sums, normed = KERNELS.add_rms_norm(array(a), array(b), *how)
    total, found = torch.from_numpy(sums), torch.from_numpy(normed)
    assert torch.equal(total, a + b)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(torch.from_numpy(KERNELS.rms_norm(sums, *how)), found)


@pytest.mark.parametrize("width", [8, 21])
def test_silu_mul(width):
    both = 30 * torch.randn(9, 2 * width)
    both[0, 0], both[0, 1] = 200.0, -200.0
    gate, up = torch.split(both, width, 1)
    found = torch.from_numpy(KERNELS.silu_mul(array(gate), array(up), 1))
    assert torch.allclose(found, F.silu(gate) * up, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_to_nearest_even_as_in_torch():
    values = torch.randn(2, 64) * torch.logspace(-20, 20, 64)
    pool = torch.zeros(3, 2, 1, 1, 4, 64, dtype=torch.bfloat16)
    still = torch.stack([torch.ones(4, 32), torch.zeros(4, 32)], 1)
    places = torch.tensor([0, 1])
    options = {"tables": still, "positions": places, "slots": places, "pool": pool}
    given = {name: array(tensor) for name, tensor in options.items()}
    KERNELS.rope_kv_write(*[array(values)] * 3, **given, layer=1)
    assert torch.equal(pool[1, :, 0, 0, :2], values.bfloat16().expand(2, 2, 64))
    assert not pool[[0, 2]].any()


def test_a_machine_without_a_compiler_has_no_native_kernels(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiler.compiled() is None


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and sources that build at once: every kernel, each empty."""
    sources = tmp_path / "sources"
    sources.mkdir()
    kernels = "".join(f"void {name}(void) {{}}\n" for name in library._SIGNATURES)
    (sources / "empty.c").write_text(kernels)
    monkeypatch.setattr(compiler, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "sagellm" / "native"


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_a_compiler_that_fails_is_no_error(monkeypatch, cache, tmp_path):
    monkeypatch.setenv("CC", executable(tmp_path / "bad", "echo no room left >&2; exit 1"))
    with logged() as logs:
        assert compiler.compiled() is None
    assert logs[-1]["log_level"] == "warning"
    assert logs[-1]["cause"].endswith("no room left")
    assert not list(cache.rglob("*.so"))


def test_the_compiler_may_come_with_arguments(monkeypatch, tmp_path):
    path = executable(tmp_path / "my cc", "")
    monkeypatch.setenv("CC", f"'{path}' -m64")
    assert compiler.c_compiler() == (path, "-m64")
    monkeypatch.setenv("CC", "'unended")
    assert compiler.c_compiler() == ()


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_compiler_of_another_name_is_found(monkeypatch, tmp_path, name):
    path = executable(tmp_path / name, "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.c_compiler() == (path,)


@pytest.mark.parametrize(
    ("answer", "named"), [("exit 0", "-march=native"), ("exit 1", "-mcpu=native")]
)
def test_a_compiler_names_this_cpu_in_its_own_way(tmp_path, answer, named):
    path = executable(tmp_path / "cc", f'case "$*" in *-march=native*) {answer};; esac')
    flags = compiler._flags((path,))
    assert [flag for flag in flags if flag.endswith("=native")] == [named]
    assert len(flags) == len(compiler._FLAGS)


def test_another_compiler_or_c_library_gets_another_library(monkeypatch, tmp_path):
    path = tmp_path / "cc"
    first = compiler._key((executable(path, "echo 1; echo built today"),))
    assert compiler._key((executable(path, "echo 1; echo built yesterday"),)) == first
    second = compiler._key((executable(path, "echo 2"),))
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "0.1"))
    assert len({first, second, compiler._key((str(path),))}) == 3


def test_a_library_that_does_not_load_is_built_once_more(cache):
    broken = compiler.compiled()
    broken.write_bytes(broken.read_bytes()[:100])
    with logged() as logs:
        assert library.open_kernels() is not None
    assert [log["event"] for log in logs] == ["native_kernels_broken", "native_kernels_built"]


def test_libraries_that_never_load_are_given_up(monkeypatch, tmp_path):
    broken = [tmp_path / name for name in "ab"]
    for path in broken:
        path.write_text("no library")
    builds = iter(broken)
    monkeypatch.setattr(library, "compiled", lambda *_: next(builds))
    assert library.open_kernels() is None
    assert not any(path.exists() for path in broken)


@pytest.mark.parametrize("writable", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(cache, writable):
    planted = compiler.compiled()
    planted.write_text("planted")
    (planted if writable == "file" else cache).chmod(0o777)
    found = compiler.compiled()
    assert found.read_bytes() != b"planted"
    assert found.stat().st_mode & 0o022 == found.parent.stat().st_mode & 0o022 == 0


def test_what_another_user_owns_is_not_loaded(monkeypatch, cache):
    planted = compiler.compiled()
    monkeypatch.setattr("os.getuid", lambda: planted.stat().st_uid + 1)
    assert compiler.compiled().parent != cache


def test_a_user_without_a_home_gets_a_temporary_folder(monkeypatch, cache):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert compiler.compiled().is_file()


def test_a_library_is_built_once(cache):
    first = compiler.compiled()
    built = first.stat().st_mtime_ns
    assert compiler.compiled() == first
    assert first.stat().st_mtime_ns == built
    assert first.parent == cache


def test_a_cache_that_cannot_be_written_to_is_done_without_once(cache, monkeypatch):
    """The next process finds the temporary folder again, and logs nothing."""
    cache.parent.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "file"))
    told = []
    with logged() as logs:
        first = compiler.compiled(told.append)
        assert compiler.compiled(told.append) == first
    assert first.parent == compiler.temporary_folder()
    assert first.parent.stat().st_mode & 0o777 == 0o700
    warned = [log for log in logs if log["log_level"] == "warning"]
    assert [log["event"] for log in warned] == ["native_kernels_in_temporary_folder"]
    assert [event.folder for event in told] == [str(first.parent)]


@pytest.mark.parametrize("planted", ["of others", "a link"])
def test_a_temporary_folder_that_others_can_write_to_is_not_used(cache, monkeypatch, planted):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    foreseen = compiler.temporary_folder()
    if planted == "a link":
        (cache.parent.parent / "elsewhere").mkdir()
        foreseen.symlink_to(cache.parent.parent / "elsewhere")
    else:
        foreseen.mkdir()
        foreseen.chmod(0o777)
    (foreseen / compiler.library_name(compiler.c_compiler())).write_text("planted")
    found = compiler.compiled()
    assert found.parent != foreseen
    assert found.read_bytes() != b"planted"
