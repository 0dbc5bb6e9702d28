"""The environments of the peers: each of its own, made when it is first needed, then reused."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READY = ".ready"


class NotInstalled(RuntimeError):
    """An environment that could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip is told: variables of its build, packages that must go again afterwards."""

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


# torchvision and torchaudio have no build for a torch without CUDA: an import of theirs fails.
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
# Tools and servers would double the five minutes that the libraries take.
_LLAMA_CPP = (
    "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF"
)
ENVIRONMENTS = {
    one.name: one
    for one in (
        Environment("gguf"),
        Environment("llama.cpp", build={"CMAKE_ARGS": _LLAMA_CPP}),
        Environment("openvino", unwanted=_CUDA_ONLY),
        Environment("transformers"),
        Environment("vllm", unwanted=_CUDA_ONLY),
    )
}


def ready(name: str) -> Path:
    """The Python of the environment `name`, which is made where it is not there, or out of date.

    Raises NotInstalled with the last thing that pip said.
    """
    wanted = ENVIRONMENTS[name]
    stamp = wanted.folder / READY
    if not stamp.is_file() or stamp.read_text() != wanted.requirements.read_text():
        print(f"making the environment {name}", file=sys.stderr)
        _make(wanted)
        stamp.write_text(wanted.requirements.read_text())
    return wanted.python


def _make(wanted: Environment) -> None:
    _run(wanted, sys.executable, "-m", "venv", str(wanted.folder))
    pip = (str(wanted.python), "-m", "pip")
    _run(wanted, *pip, "install", "--no-compile", "-r", str(wanted.requirements))
    if wanted.unwanted:
        _run(wanted, *pip, "uninstall", "--yes", *wanted.unwanted)


def _run(wanted: Environment, *command: str) -> None:
    env = {**wanted.build, **os.environ}  # who sets CMAKE_ARGS means it
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said or ["nothing"]
        raise NotInstalled(f"environment {wanted.name}: {errors[-1].strip()}")
