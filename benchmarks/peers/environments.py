"""The environments of the peers, made when first needed, then reused."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READY = ".ready"
CPU = Path("/proc/cpuinfo")


class NotInstalled(RuntimeError):
    """An environment could not be made. The message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment; `build`: variables for pip; `unwanted`: packages to remove afterwards."""

    name: str
    build: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        return ROOT / ".venv-peers" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


# torchvision and torchaudio have no build for a torch without CUDA: importing them fails.
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
# Building tools and servers too would double the five minutes that the libraries take.
_LLAMA_CPP = (
    "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF"
)
# Without these, ik_llama.cpp may leave its AVX-512 kernels out, and says nothing.
_AVX512 = {
    "avx512f": "-DGGML_AVX512=ON",
    "avx512vbmi": "-DGGML_AVX512_VBMI=ON",
    "avx512_vnni": "-DGGML_AVX512_VNNI=ON",
    "avx512_bf16": "-DGGML_AVX512_BF16=ON",
}


def avx512_options(listing: str) -> str:
    """The CMake options of the AVX-512 instruction sets in a /proc/cpuinfo `listing`."""
    lines = [line for line in listing.splitlines() if line.startswith("flags")]
    flags = lines[0].split() if lines else []
    return " ".join(option for flag, option in _AVX512.items() if flag in flags)


# The library finds its neighbour through $ORIGIN. Kernels for a quantised KV cache are left out,
# because they take long to build. The included file adds what the source package lacks.
_IK_LLAMA_CPP = (
    "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_IQK_FA_ALL_QUANTS=OFF -DLLAMA_CURL=OFF "
    f"-DCMAKE_INSTALL_RPATH=$ORIGIN -DCMAKE_PROJECT_ik_llama_cpp_python_INCLUDE="
    f"{shlex.quote(str(HERE / 'requirements' / 'ik_llama.cpp.cmake'))} "
) + avx512_options(CPU.read_text() if CPU.exists() else "")
ENVIRONMENTS = {
    one.name: one
    for one in (
        Environment("gguf"),
        Environment("llama.cpp", build={"CMAKE_ARGS": _LLAMA_CPP}),
        Environment("ik_llama.cpp", build={"CMAKE_ARGS": _IK_LLAMA_CPP}),
        Environment("openvino", unwanted=_CUDA_ONLY),
        Environment("transformers"),
        Environment("vllm", unwanted=_CUDA_ONLY),
        Environment("vllm+zentorch", unwanted=_CUDA_ONLY),
    )
}


def ready(name: str) -> Path:
    """The Python of the environment `name`. Makes an environment that is missing or out of date.

    Raises NotInstalled with the last error of pip.
    """
    environment = ENVIRONMENTS[name]
    stamp = environment.folder / READY
    if not stamp.is_file() or stamp.read_text() != environment.requirements.read_text():
        print(f"making the environment {name}", file=sys.stderr)
        _make(environment)
        stamp.write_text(environment.requirements.read_text())
    return environment.python


def _make(environment: Environment) -> None:
    _run(environment, sys.executable, "-m", "venv", str(environment.folder))
    pip = (str(environment.python), "-m", "pip")
    _run(environment, *pip, "install", "--no-compile", "-r", str(environment.requirements))
    if environment.unwanted:
        _run(environment, *pip, "uninstall", "--yes", *environment.unwanted)


def _run(environment: Environment, *command: str) -> None:
    env = {**environment.build, **os.environ}  # a user's own CMAKE_ARGS take precedence
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        output = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in output if "error" in line.lower()] or output or ["nothing"]
        raise NotInstalled(f"environment {environment.name}: {errors[-1].strip()}")
