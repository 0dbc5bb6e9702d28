"""The ways through the C kernels: a table of instruction sets, and how to build and run each."""

import functools
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from native_kernels import attention, products, quantised, rows, steps, teams
from native_kernels.calls import run
from native_kernels.cases import Case

from sagellm.backends.cpu.native import compiler

DRIVER = Path(__file__).parent / "driver.c"
SOURCES = Path(compiler.__file__).parent
WRAPPED = ("malloc", "calloc", "realloc", "aligned_alloc", "pthread_create")
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
MACHINE = _MACHINES.get(platform.machine(), platform.machine())


@dataclass(frozen=True)
class KernelPath:
    """An instruction set. `features`: what /proc/cpuinfo must list, to run it without an emulator;
    `cpu`: what qemu-user emulates, a CPU without any later instruction where it has one.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    features: str
    cpu: str = ""

    @property
    def is_here(self) -> bool:
        """Whether this machine's CPU runs it."""
        return self.machine == MACHINE and set(self.features.split()) <= cpu_features()

    @property
    def has_tiles(self) -> bool:
        """Whether its kernels have tiles: those of the model."""
        return "-DSAGE_TILE_MODEL" in self.flags

    @property
    def missing(self) -> str:
        """What is missing to run it here: a CPU, or packages of Debian; "" if nothing is."""
        if not self.is_here and not self.cpu:
            return f"a CPU with {self.features}"
        prefix = "" if self.machine == MACHINE else f"{self.machine}-linux-gnu-"
        package = f"gcc-{prefix.rstrip('-')}".rstrip("-").replace("x86_64", "x86-64")
        tools = {f"{prefix}gcc": package, self.gcov: package}
        if not self.is_here:
            tools[f"qemu-{self.machine}"] = "qemu-user"
        needed = {package for tool, package in tools.items() if not shutil.which(tool)}
        return f"apt-get install {' '.join(sorted(needed))}" if needed else ""

    @property
    def compiler(self) -> str:
        return "gcc" if self.machine == MACHINE else f"{self.machine}-linux-gnu-gcc"

    @property
    def gcov(self) -> str:
        return "gcov" if self.machine == MACHINE else f"{self.machine}-linux-gnu-gcov"

    def command(self, driver: Path) -> tuple[str, ...]:
        """The command that runs a driver of this path."""
        if self.is_here:
            return (str(driver),)
        return (f"qemu-{self.machine}", "-cpu", self.cpu, str(driver))

    def build(self, folder: Path, *extra: str) -> Path:
        """Compile the driver with all kernels, with the flags of the product and `extra`.

        Raises CalledProcessError.
        """
        skipped = ("-march=native", "-shared", "-fPIC")
        flags = [flag for flag in compiler._FLAGS if flag not in skipped]
        linked = [f"-Wl,--wrap={name}" for name in WRAPPED]
        if self.machine != MACHINE:  # an emulator would look for the other machine's libraries
            linked.append("-static")
        driver, sources = folder / "driver", [DRIVER, *sorted(SOURCES.glob("*.c"))]
        command = [self.compiler, *flags, *self.flags, *extra, *linked, f"-I{SOURCES}"]
        subprocess.run(
            [*command, "-o", str(driver), *map(str, sources), "-lm"],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        return driver

    def failures(self, driver: Path, folder: Path) -> Iterator[str]:
        """Run all cases, and give the name and the reason of each that fails."""
        cases = [*all_cases(), *(tile_cases() if self.has_tiles else ())]
        found = run(self.command(driver), [case.calls for case in cases], folder)
        for case, results in zip(cases, found, strict=True):
            try:
                case.check(results)
            except AssertionError as error:
                yield f"{case.calls.name}: {error}"


@functools.cache
def cpu_features() -> frozenset[str]:
    """The features that Linux lists."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(listed, "").split())


@functools.cache
def all_cases() -> tuple[Case, ...]:
    groups = (products, quantised, attention, rows, steps, teams)
    return tuple(case for group in groups for case in group.cases())


@functools.cache
def tile_cases() -> tuple[Case, ...]:
    return (*products.tile_cases(), *attention.tile_cases())


_AVX2 = "avx2 fma f16c bmi2"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512vl avx512dq avx512cd"
_V4 = "-march=x86-64-v4"
_BF16 = "avx512_bf16 avx512_vnni"

PATHS = (
    KernelPath("x86-64", "x86_64", ("-march=x86-64",), "sse2", "qemu64"),
    KernelPath("AVX2", "x86_64", ("-march=x86-64-v3",), _AVX2, "max"),
    KernelPath("AVX512", "x86_64", (_V4,), _AVX512),
    KernelPath("AVX512-VNNI", "x86_64", (_V4, "-mavx512vnni"), f"{_AVX512} avx512_vnni"),
    KernelPath(
        "AVX512-BF16", "x86_64", (_V4, "-mavx512vnni", "-mavx512bf16"), f"{_AVX512} {_BF16}"
    ),
    KernelPath(
        "AVX512-VBMI",
        "x86_64",
        (_V4, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
        f"{_AVX512} {_BF16} avx512vbmi",
    ),
    KernelPath("tile model", "x86_64", ("-march=x86-64-v3", "-DSAGE_TILE_MODEL"), _AVX2, "max"),
    KernelPath(
        "tile model, AVX512",
        "x86_64",
        (_V4, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-DSAGE_TILE_MODEL"),
        f"{_AVX512} {_BF16} avx512vbmi",
    ),
    KernelPath("NEON", "aarch64", ("-march=armv8-a",), "asimd", "cortex-a57"),
    KernelPath("NEON-dotprod", "aarch64", ("-march=armv8.2-a+dotprod",), "asimddp", "neoverse-n1"),
    KernelPath(
        "NEON-i8mm-BF16",
        "aarch64",
        ("-march=armv8.2-a+dotprod+i8mm+bf16",),
        "asimddp i8mm bf16",
        "max,sve=off",
    ),
    KernelPath(
        "SVE", "aarch64", ("-march=armv8.6-a+sve",), "asimddp i8mm bf16 sve", "max,sve256=on"
    ),
)
