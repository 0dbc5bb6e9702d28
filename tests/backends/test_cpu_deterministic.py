"""With `deterministic`, a row's logits are the same bits alone, in a batch and in chunks."""

import pytest
import torch

from sagellm.backends.cpu import CpuBackend

CASES = pytest.mark.parametrize(
    ("native", "dtype", "kv_cache_dtype"),
    [
        *((native, dtype, None) for native, dtype in ((True, "float32"), (True, "bfloat16"))),
        (False, "float32", None),
        (True, "bfloat16", "int8"),
        (False, "float32", "int8"),
    ],
)
FAMILIES = pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def alone(sequences, prompt):
    """Rows of a 40-token prompt in one step and 10 tokens one by one."""
    parts = [sequences.step({"a": prompt[:40]})["a"]]
    parts += [sequences.step({"a": [token]})["a"] for token in prompt[40:]]
    return torch.cat(parts)


@CASES
@FAMILIES
def test_chunks_of_seven_change_no_bit(reference, paged, family, native, dtype, kv_cache_dtype):
    model, prompt, backend = reference(family), tokens(50, seed=1), CpuBackend(native=native)
    options = {"dtype": dtype, "deterministic": True, "kv_cache_dtype": kv_cache_dtype}
    wanted = alone(paged(model, backend, **options), prompt)
    sequences = paged(model, backend, **options)
    parts = [sequences.step({"a": prompt[top : top + 7]})["a"] for top in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), wanted)


@CASES
@FAMILIES
def test_eight_others_change_no_bit(reference, paged, family, native, dtype, kv_cache_dtype):
    model, prompt, backend = reference(family), tokens(50, seed=1), CpuBackend(native=native)
    options = {"dtype": dtype, "deterministic": True, "kv_cache_dtype": kv_cache_dtype}
    wanted = alone(paged(model, backend, **options), prompt)
    sequences = paged(model, backend, **options)
    others = {str(seed): tokens(11 + 3 * seed, seed) for seed in range(8)}
    parts = [sequences.step({**others, "a": prompt[:40]})["a"]]
    for token in prompt[40:]:
        step = sequences.step({"0": [5], "1": [9, 8], "a": [token], "7": [token] * 3})
        parts.append(step["a"])
    assert torch.equal(torch.cat(parts), wanted)


@FAMILIES
def test_logits_agree_with_transformers(reference, paged, family):
    model, prompt = reference(family), tokens(60, seed=2)
    found = paged(model, deterministic=True).step({"a": prompt})["a"]
    assert (found - model.logits(prompt)).abs().max() < 1e-4
