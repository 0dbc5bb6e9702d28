"""Compiling sources of the C kernels for CPUs that this machine may not have."""

import subprocess
from pathlib import Path

import pytest

from sagellm.backends.cpu.native import compiler


def compile_for(cpu: str, source: str, folder: Path) -> None:
    """Compile one source in `folder` without warnings. Skips the test if the compiler does not know
    the CPU.
    """
    command = [*compiler.c_compiler(), f"-march={cpu}", "-O1", "-Wno-psabi", "-c"]
    probe = folder / "probe.c"
    probe.write_text("int sagellm;")
    target = ["-o", str(folder / "out.o")]
    if subprocess.run([*command, str(probe), *target], capture_output=True).returncode:
        pytest.skip("a compiler for other CPUs")
    path = str(compiler._SOURCES / source)
    done = subprocess.run([*command, "-Wall", "-Werror", path, *target], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
