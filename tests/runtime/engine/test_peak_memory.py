"""The memory of an engine: its weights once, its keys and values, and little besides."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models_on_the_fly import SMALL, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from sagellm.backends.cpu.native.library import native_kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak"),
    pytest.mark.skipif(native_kernels() is None, reason="no C compiler on this machine"),
]
CHILD = Path(__file__).parents[2] / "engine_memory.py"
PROMPT_LEN = 600  # so that the mapped pages of all rows of an embedding are read
# 101 MB of weights, a third of them in the embedding, which the logits share.
LARGE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048}
LARGE |= {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
TABLE_BYTES = 32000 * 512 * 2
KV_BYTES = (PROMPT_LEN + 8) * 8 * 2 * 4 * 64 * 2
BESIDES = 15 << 20  # 10 MB are needed; a second embedding would take 33 MB
BITS = {None: 16, "int8": 8.5, "w8a8": 8.5, "int4": 4.5}  # of a weight


@dataclass(frozen=True)
class Memory:
    peak: int
    steady: int

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.peak - other.peak, self.steady - other.steady)


def make(folder: Path, **sizes: int) -> Path:
    config = AutoConfig.for_model("qwen2", **{**SMALL, **sizes}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def memory(folder: Path, **options: object) -> Memory:
    """The memory of a process with one engine, after an answer to a long prompt."""
    few = {"threads": 1, "num_blocks": 1000, "max_num_batched_tokens": 64}  # small activations
    asked = json.dumps({"model": str(folder), **few, **options})
    command = [sys.executable, str(CHILD), asked, str(PROMPT_LEN)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return Memory(**json.loads(found.stdout))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make(tmp_path_factory.mktemp("large"), **LARGE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The memory of a process with an engine of next to no weights."""
    return memory(make(tmp_path_factory.mktemp("small")))


@pytest.mark.parametrize("mode", BITS)
def test_an_engine_needs_its_weights_and_its_kv_and_little_besides(large, base, mode):
    weight_bytes = (large / "model.safetensors").stat().st_size * BITS[mode] / 16
    if mode:  # the embedding stays as it is stored, beside the weight of the logits
        weight_bytes += TABLE_BYTES
    found = memory(large, quantization=mode) - base
    limit = weight_bytes + KV_BYTES + BESIDES
    assert found.peak < limit, found
    assert found.steady < limit, found
