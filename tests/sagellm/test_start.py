"""The cost of the first token: loaded packages and libraries, and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gateway_process import served_process
from models_on_the_fly import make_model
from safetensors.torch import load_file, save_file

from sagellm.backends.cpu.native.library import native_kernels

FIRST_TOKEN = """
import sys
import trio
from sagellm import Graph, Sampling

async def main():
    async with Graph.load("joint").open(model=sys.argv[1]) as session:
        answer = await session.generate([1] * 16, sampling=Sampling(max_tokens=1))
        assert answer.finish_reason in ("stop", "length"), answer

trio.run(main)
"""
MODULES = FIRST_TOKEN + "print(*sys.modules)"
PEAK = (
    FIRST_TOKEN + "print([l for l in open('/proc/self/status') if l[:5] == 'VmHWM'][0].split()[1])"
)

# Each import takes tenths of a second to seconds, and an answer needs none of them.
NOT_NEEDED = {
    *("transformers", "torch", "sympy", "accelerate", "scipy"),
    *("httpx", "httpx2", "requests", "aiohttp", "openai", "huggingface_hub.errors"),
    *("starlette", "hypercorn", "uvicorn", "cyclopts", "pydantic", "prometheus_client"),
    *("opentelemetry", "matplotlib", "pandas", "structlog", "rich"),
}
NO_COMPILER = "no-such-compiler"
SLACK_BYTES = 48 << 20  # pages that are read, and not given back yet; oneDNN's own code


def said(code: str, model: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, model]
    settings = {**os.environ, **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=settings
    )
    return done.stdout


def test_the_first_token_needs_no_heavy_package() -> None:
    loaded = set(said(MODULES, "sage-tiny").split())
    assert "numpy" in loaded
    assert sorted(loaded & NOT_NEEDED) == []


@pytest.mark.skipif(sys.platform != "linux", reason="psutil says what Linux has in /proc")
def test_an_engine_loads_neither_what_grammars_need_nor_psutil() -> None:
    code = (
        "import sys; from sagellm.runtime.engine.kinds.local import open_engine; "
        "from sagellm.runtime.engine.options import EngineOptions; "
        "open_engine(EngineOptions(model='sage-tiny'), name='e'); print(*sys.modules); "
        "import os; sys.stdout.flush(); os._exit(0)"
    )
    loaded = set(said(code, "").split())
    assert "numpy" in loaded
    assert sorted(loaded & {"llguidance", "psutil"}) == []


@pytest.mark.parametrize("is_enabled", [True, False])
def test_an_import_collects_garbage_once_at_most_and_leaves_the_collector_as_it_was(
    is_enabled: bool,
) -> None:
    code = (
        "import gc; import sagellm; found = []; gc.callbacks.append(lambda *a: found.append(a)); "
        f"gc.{'enable' if is_enabled else 'disable'}(); sagellm.Graph; "
        "print(sum(phase == 'start' for phase, _ in found), gc.isenabled())"
    )
    num_collections, left = said(code, "").split()
    assert int(num_collections) <= 1
    assert left == str(is_enabled)


NATIVE = pytest.mark.skipif(native_kernels() is None, reason="no C compiler on this machine")


@NATIVE
@pytest.mark.parametrize("executor", ["tasks", "processes"])
def test_a_command_answers_without_torch(executor: str) -> None:
    command = ["run", "joint", "--prompt", "What is 20 + 31?", "--executor", executor]
    code = (
        f"import sys; from sagellm.cli import main; code = main({command}); "
        "print(code, 'torch' in sys.modules)"
    )
    assert said(code, "").splitlines()[-1] == "0 False"


@NATIVE
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("executor", ["tasks", "processes"])
def test_no_process_of_a_server_loads_torch(executor: str) -> None:
    with served_process("--executor", executor, graph="graphs/joint.yaml") as served:
        served.complete()
        processes = [served.process, *served.process.children(recursive=True)]
        maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in processes]
    assert len(maps) > (1 if executor == "processes" else 0)
    assert [number for number, text in enumerate(maps) if "libtorch" in text] == []


def test_without_a_compiler_torch_computes() -> None:
    assert "torch" in said(MODULES, "sage-tiny", CC=NO_COMPILER).split()


def test_collections_of_cycles_go_on_without_what_torch_brought() -> None:
    now = "import gc; print(gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()))"
    found = said(FIRST_TOKEN + now, "sage-tiny", CC=NO_COMPILER)
    is_enabled, num_frozen, num_others = found.split()
    assert is_enabled == "True"
    assert int(num_frozen) > 5 * int(num_others)


def test_whoever_collects_by_hand_is_left_to_it() -> None:
    now = "print(gc.isenabled(), gc.get_freeze_count())"
    code = f"import gc; gc.disable()\n{FIRST_TOKEN}{now}"
    assert said(code, "sage-tiny", CC=NO_COMPILER).split() == ["False", "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """The embedding table, which the logits share, is in memory once too."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    model = make_model("qwen2", tmp_path, vocab_size=98304, **shape)
    in_bfloat16(model)
    num_bytes = (model / "model.safetensors").stat().st_size
    assert num_bytes > 140e6
    taken = 1024 * (int(said(PEAK, str(model))) - int(said(PEAK, "sage-tiny")))
    assert taken < num_bytes + SLACK_BYTES


def in_bfloat16(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, model / "model.safetensors"
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
