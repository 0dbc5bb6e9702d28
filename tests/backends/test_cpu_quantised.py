"""Programs with quantised weights: close to the float model, the same in any batch."""

import dataclasses

import pytest
import torch

from sagellm.backends import LoweringError
from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.torch_linear import quantised, tensor
from sagellm.backends.quantised_weight import MODES, QuantisedWeight

WAYS = pytest.mark.parametrize("native", [True, False], ids=["C", "torch"])
ALL_MODES = pytest.mark.parametrize("mode", MODES)
MOST_ERROR = {"int8": 0.03, "int4": 0.4, "w8a8": 0.05}  # of the logits of a tiny random model


def tokens(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def error(found, right):
    return float((found - right).norm() / right.norm())


def replaced(model, make):
    """The model with every weight of a linear replaced by `make` of it."""
    made = {
        name: make(name, weight) if "proj.weight" in name or "lm_head" in name else weight
        for name, weight in model.weights.items()
    }
    return dataclasses.replace(model, weights=made)


def dequantised(model):
    def floats(_, weight):
        return tensor(weight.dequantised()) if isinstance(weight, QuantisedWeight) else weight

    return replaced(model, floats)


@WAYS
@ALL_MODES
@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "qwen3"])
def test_logits_are_near_those_of_the_floats(reference, paged, family, mode, native):
    model, prompt = reference(family), tokens(60)
    found = paged(model, CpuBackend(native=native), quantization=mode).step({"a": prompt})["a"]
    assert 1e-4 < error(found, model.logits(prompt)) < MOST_ERROR[mode]


@ALL_MODES
def test_c_and_torch_agree(reference, paged, mode):
    model, prompt = reference("qwen3"), tokens(40)
    ways = [paged(model, CpuBackend(native=way), quantization=mode) for way in (True, False)]
    quick, slow = (way.step({"a": prompt})["a"] for way in ways)
    assert error(quick, slow) < (5e-2 if mode == "int4" else 5e-3)


@WAYS
@ALL_MODES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_batch(reference, paged, mode, native, dtype):
    model, prompt = reference("qwen2"), tokens(30)
    options = {"dtype": dtype, "deterministic": True, "quantization": mode}

    def sequences():
        return paged(model, CpuBackend(native=native), **options)

    alone = sequences()
    wanted = [alone.step({"a": prompt[:20]})["a"]]
    wanted += [alone.step({"a": [token]})["a"] for token in prompt[20:]]
    crowd = sequences()
    others = {str(seed): tokens(11 + 3 * seed, seed) for seed in range(8)}
    found = [crowd.step({**others, "a": prompt[:20]})["a"]]
    found += [crowd.step({"0": [5], "a": [token], "7": [9] * 3})["a"] for token in prompt[20:]]
    assert torch.equal(torch.cat(found), torch.cat(wanted))


@WAYS
def test_deterministic_int4_is_exactly_its_weights(reference, paged, native):
    model, prompt = reference("qwen3"), tokens(40)
    stored = replaced(model, lambda name, w: quantised(w, 8 if "head" in name else 4))
    backend = CpuBackend(native=native)
    wanted = paged(dequantised(stored), backend, deterministic=True).step({"a": prompt})["a"]
    for way, mode in ((stored, None), (model, "int4")):
        found = paged(way, backend, deterministic=True, quantization=mode).step({"a": prompt})["a"]
        assert error(found, wanted) < 2e-4


@WAYS
def test_stored_forms_may_differ_within_a_layer(reference, paged, native):
    """q in 4 bits, k in 8, v in floats; gate in 4 bits with groups of 64, up with groups of 32."""
    model, prompt = reference("llama_biased", num_attention_heads=4), tokens(40)

    def make(name, weight):
        if "q_proj" in name or "up_proj" in name:
            return quantised(weight, 4)
        if "k_proj" in name:
            return dataclasses.replace(quantised(weight, 8), order=None)
        if "gate_proj" in name:
            made = quantised(weight, 4)
            return dataclasses.replace(made, group=64, scales=made.scales[:, ::2].copy())
        return weight

    stored, backend = replaced(model, make), CpuBackend(native=native)
    found = paged(stored, backend, deterministic=True).step({"a": prompt})["a"]
    wanted = paged(dequantised(stored), backend, deterministic=True).step({"a": prompt})["a"]
    assert error(found, wanted) < 2e-4


def test_a_quantised_embedding_is_refused(reference, paged):
    model = reference("llama")
    name = "model.embed_tokens.weight"
    weights = {**model.weights, name: quantised(model.weights[name], 8)}
    with pytest.raises(LoweringError, match="only weights of linears may be"):
        paged(dataclasses.replace(model, weights=weights))


def test_a_quantised_weight_of_another_shape_is_named(reference, paged):
    model = reference("llama")
    weights = {**model.weights, "lm_head.weight": quantised(torch.zeros(96, 64), 8)}
    with pytest.raises(LoweringError, match=r"'lm_head.weight' is \[96, 64\].* says \[97, 64\]"):
        paged(dataclasses.replace(model, weights=weights))


def test_the_modes_are_what_the_backend_offers():
    assert CpuBackend().quantizations == tuple(MODES)
