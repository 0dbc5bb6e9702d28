"""The environments of the peers, made when first needed, then reused."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READY = ".ready"


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
