"""The models in each peer's format, made once by its own tools in its own environment."""

import subprocess
from pathlib import Path

from benchmarks.peers.environments import HERE, NotInstalled, ready
from benchmarks.shape import Shape
from benchmarks.weights import cache_folder, model_folder

DRIVERS = HERE / "drivers"
_QUANTISED = {"int8": "q8_0", "w8a8": "q8_0", "int4": "q4_0"}
_OPENVINO = {"bf16": "fp16", "int8": "int8", "w8a8": "int8"}


def folder(shape: Shape, row: str) -> Path:
    """The folder for transformers, equal for all rows: these engines quantise at load."""
    return model_folder(shape)


def gguf_file(shape: Shape, row: str = "bf16") -> Path:
    """The file for llama.cpp. Raises NotInstalled."""
    file = cache_folder() / f"random-{shape.name}.gguf"
    _make(file, "gguf", "gguf_file.py", model_folder(shape))
    if row == "bf16":
        return file
    kind = _QUANTISED[row]
    copy = file.with_suffix(f".{kind}.gguf")
    _make(copy, "llama.cpp", "llama_cpp_quantise.py", file, kind)
    return copy


def openvino_folder(shape: Shape, row: str) -> Path:
    """The folder for OpenVINO, with weights in float16 or int8. Raises NotInstalled."""
    precision = _OPENVINO[row]
    made = cache_folder() / f"random-{shape.name}.openvino-{precision}"
    _make(made, "openvino", "openvino_model.py", model_folder(shape), precision)
    return made


def _make(target: Path, environment: str, script: str, source: Path, *options: str) -> None:
    """Run SCRIPT SOURCE TARGET OPTIONS if `target` is missing. A partial file is never kept."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    command = [*map(str, (ready(environment), DRIVERS / script, source, part)), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = done.stderr.strip().splitlines() or ["nothing said"]
        raise NotInstalled(f"{script} of {environment} failed: {errors[-1]}")
    part.rename(target)
