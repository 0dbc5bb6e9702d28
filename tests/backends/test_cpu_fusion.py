"""Fusing kernels changes no logits."""

import pytest
import torch

from sagellm.backends.cpu import CpuBackend
from sagellm.graphs.passes import KERNEL_PASSES

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]


def logits(paged, model, passes, native):
    sequences = paged(model, CpuBackend(passes=passes, native=native))
    first = sequences.step({"a": PROMPT[:9], "b": PROMPT[:1]})["a"]
    return torch.cat([first, sequences.step({"b": PROMPT[1:3], "a": PROMPT[9:]})["a"]])


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("family", ["llama_biased", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("count", range(1, len(KERNEL_PASSES) + 1))
def test_logits_stay_after_each_pass(reference, paged, family, native, count):
    model = reference(family)
    found = logits(paged, model, KERNEL_PASSES[:count], native)
    assert torch.allclose(found, logits(paged, model, (), native), atol=2e-5)


def test_the_stages_are_named_in_order():
    names = list(CpuBackend().stages)
    assert names == ["activations_float32", *(step.name for step in KERNEL_PASSES), "infer"]


def test_a_fused_program_has_fewer_instructions(reference, paged):
    model = reference("llama")
    plain, fused = (
        str(paged(model, CpuBackend(passes=passes)).program) for passes in ((), KERNEL_PASSES)
    )
    assert "qkv_linear" in fused
    assert fused.count("\n") < plain.count("\n") * 2 / 3
