"""Lowering to the CPU: which weights it reads, what it refuses, the memory it gives."""

import numpy as np
import psutil
import pytest
import torch
from tensors import arrays

from sagellm.backends import KVLayout, LoweringError
from sagellm.backends.arrays import dtype_name, opaque
from sagellm.backends.cpu import CpuBackend, torch_linear
from sagellm.backends.cpu.torch_linear import tensor
from sagellm.graphs.models import build


class Counted(dict):
    """Weights that count how often each is read."""

    def __init__(self, weights):
        super().__init__(weights)
        self.reads = dict.fromkeys(weights, 0)

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


def lowered(model, weights, dtype="float32", native=True):
    options = {"layout": model.layout(dtype), "dtype": dtype, "deterministic": False}
    return CpuBackend(native=native).device().lower(build(model.config), weights, **options)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_each_weight_is_read_once(reference, family):
    model = reference(family)
    weights = Counted(arrays(model.weights))
    lowered(model, weights)
    tied = {"lm_head.weight": 0} if model.facts.tie_embeddings else {}
    assert weights.reads == {**dict.fromkeys(weights, 1), **tied}


def test_a_missing_weight_is_named(reference):
    model = reference("llama")
    weights = {k: v for k, v in model.weights.items() if "up_proj" not in k}
    weights = arrays(weights)
    with pytest.raises(LoweringError, match=r"no weight 'model.layers.0.mlp.up_proj.weight'"):
        lowered(model, weights)


def test_a_weight_of_another_shape_is_named(reference):
    model = reference("llama")
    weights = {**model.weights, "lm_head.weight": torch.zeros(96, 64)}
    weights = arrays(weights)
    with pytest.raises(LoweringError, match=r"'lm_head.weight' is \[96, 64\].* says \[97, 64\]"):
        lowered(model, weights)


@pytest.mark.parametrize("dtype", [np.dtype(np.int8), opaque("float8_e4m3fn", 1)])
def test_a_quantised_weight_is_refused(reference, dtype):
    model = reference("llama")
    weights = {**arrays(model.weights), "lm_head.weight": np.zeros((97, 64), dtype)}
    name = dtype_name(dtype)
    with pytest.raises(LoweringError, match=f"'lm_head.weight' is stored as {name}; quantised"):
        lowered(model, weights)


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_logits_alone_are_not_rounded_to_bfloat16(reference, monkeypatch, family):
    model, rounded = reference(family), []
    monkeypatch.setattr(torch_linear, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(torch_linear, "packed", lambda weight, bias: rounded.append(len(weight)))
    lowered(model, arrays(model.weights), "bfloat16", native=False)
    assert len(rounded) == 4 * model.facts.num_layers
    assert model.facts.vocab_size not in rounded


def test_an_unknown_dtype_is_refused(reference):
    with pytest.raises(LoweringError, match="no dtype 'float16'; use float32 or bfloat16"):
        lowered(reference("llama"), {}, "float16")


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_bfloat16_weights_and_pool_stay_near_float32(reference, paged, native):
    model, prompt = reference("qwen3"), list(range(40))
    backend = CpuBackend(native=native)
    found = paged(model, backend, dtype="bfloat16").step({"a": prompt})["a"]
    wanted = model.logits(prompt)
    assert (found - wanted).abs().mean() < 0.03 * wanted.abs().mean()
    assert found.dtype == torch.float32


def test_a_pool_is_zero_and_of_the_layouts_shape(reference):
    layout = reference("llama").layout("bfloat16")
    pool = tensor(CpuBackend().device().allocate(layout, 5).pool)
    assert pool.shape == layout.pool_shape(5)
    assert pool.dtype == torch.bfloat16
    assert not pool.any()


def test_a_pool_takes_memory_only_where_it_is_written():
    layout = KVLayout(num_layers=8, num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16")
    before = psutil.Process().memory_info().rss
    pool = tensor(CpuBackend().device().allocate(layout, 4096).pool)  # 1 GiB
    pool[3, 1, 17] = 1.0
    assert pool[3, 1, 16:19].sum() == 8 * 16 * 64  # and zeros around it
    assert psutil.Process().memory_info().rss - before < pool.nbytes / 100


def test_there_is_memory_on_one_device():
    assert CpuBackend().devices() == ("cpu",)
    assert CpuBackend().device().memory_bytes > 0
