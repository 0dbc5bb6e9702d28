"""The step in one native call against its kernels one by one: when it is used, what it keeps."""

import ctypes
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensors import arrays

from sagellm.backends.cpu import CpuBackend, program
from sagellm.backends.cpu.lowerings import CpuProgram
from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.program import LogitsMemory, NativeProgram
from sagellm.backends.cpu.torch_linear import array
from sagellm.graphs.models import build

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
FAMILIES = ["llama", "llama_biased", "llama3", "mistral", "qwen2", "qwen2_sliding", "qwen3"]
TABLE = "model.embed_tokens.weight"
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def native(paged, model, dtype="float32", passes=None):
    backend = CpuBackend() if passes is None else CpuBackend(passes=passes)
    sequences = paged(model, backend, dtype=dtype, deterministic=True)
    assert isinstance(sequences.program, NativeProgram)
    return sequences


def on_tensors(paged, model, dtype="float32"):
    """The same kernels, one by one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sagellm.backends.cpu.program.NATIVE_FORMS", {})
        sequences = paged(model, dtype=dtype, deterministic=True)
    assert isinstance(sequences.program, CpuProgram)
    return sequences


RAGGED = [
    {"a": 30, "b": 1},
    {"a": 1, "b": 7, "c": 1},
    {"c": 40, "b": 1, "a": 1},
    {"a": 2, "b": 1, "c": 1},
    {"d": 130, "a": 1},
    {"d": 1},
]


@DTYPES
@pytest.mark.parametrize("passes", [None, ()], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_steps_agree_with_kernels_one_by_one(reference, paged, family, passes, dtype):
    model = reference(family)
    prompts = {name: tokens(150, seed) for seed, name in enumerate("abcd")}
    step, kernels = native(paged, model, dtype, passes), on_tensors(paged, model, dtype)
    for cut in RAGGED:
        starts = {name: step.lengths.get(name, 0) for name in cut}
        batch = {n: prompts[n][starts[n] : starts[n] + count] for n, count in cut.items()}
        found, wanted = step.step(batch), kernels.step(batch)
        for name in cut:
            assert torch.allclose(found[name], wanted[name], atol=5e-2 if dtype[0] == "b" else 1e-4)
    used = [block for blocks in step.blocks.values() for block in blocks]
    pools = (step.pool[:, :, used].float(), kernels.pool[:, :, used].float())
    assert torch.allclose(*pools, atol=5e-2 if dtype[0] == "b" else 1e-4)


@DTYPES
def test_any_number_of_rows_after_any_other(reference, paged, dtype):
    model, prompt = reference("qwen2"), tokens(300, seed=1)
    whole = native(paged, model, dtype).step({"a": prompt})["a"]
    sequences = native(paged, model, dtype)
    for count in (1, 16, 2, 17, 3, 40, 4, 15, 5, 33, 6, 7, 8, 9, 1):
        start = sequences.lengths.get("a", 0)
        found = sequences.step({"a": prompt[start : start + count]})["a"]
        assert torch.equal(found, whole[start : start + count])


@DTYPES
@pytest.mark.parametrize("way", [native, on_tensors], ids=["in one call", "kernel by kernel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_of_threads_changes_a_bit(reference, paged, kept_threads, family, way, dtype):
    model, batches = reference(family), [{"a": tokens(40, 1), "b": [5], "c": tokens(9, 2)}]
    batches.append({"a": [1], "c": [2], "b": [3]})

    def logits(threads):
        torch.set_num_threads(threads)
        sequences = way(paged, model, dtype)
        return torch.cat([row for batch in batches for row in sequences.step(batch).values()])

    alone = logits(1)
    for threads in (2, 3, 8) if family == "mistral" else (3,):
        assert torch.equal(logits(threads), alone), threads


def test_results_are_the_callers(reference, paged):
    sequences = native(paged, reference("llama"))
    first = sequences.step({"a": [1, 2, 3]})["a"]
    kept = first.clone()
    sequences.step({"b": [4, 5, 6]})
    assert torch.equal(first, kept)


def test_a_row_may_be_wanted_twice_and_none_at_all(reference, paged):
    sequences = native(paged, reference("llama"))
    whole = sequences.step({"a": [1, 2, 3]})["a"]
    inputs = sequences._inputs({"a": [1, 2, 3]})
    for chosen in ([2, 0, 2, 2, 1, 0, *[1] * 30], []):
        rows = np.array(chosen, dtype=np.int64)
        found = sequences.run(replace(inputs, logit_rows=rows))
        assert torch.equal(found, whole[rows])


def untied(model):
    """The same model with a weight of its own for the logits."""
    weights = {**model.weights, "lm_head.weight": model.weights[TABLE].clone()}
    return replace(model, config={**model.config, "tie_word_embeddings": False}, weights=weights)


@DTYPES
@pytest.mark.parametrize("has_pairs", [True, False])
def test_a_tied_embedding_has_the_bits_of_an_untied_one(reference, paged, dtype, has_pairs):
    model, batches = reference("qwen2"), [{"a": [*range(97)], "b": [3]}, {"b": [96]}]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(KERNELS), "has_pairs", has_pairs and KERNELS.has_pairs)
        tied, other = native(paged, model, dtype), native(paged, untied(model), dtype)
    for batch in batches:
        found, wanted = tied.step(batch), other.step(batch)
        assert all(torch.equal(found[name], wanted[name]) for name in batch)


class Lent(dict):
    """Weights that are copied for each access; `held`: the names whose copies are alive."""

    def __init__(self, weights):
        super().__init__(weights)
        self._lent = {}

    def __getitem__(self, name):
        copy = super().__getitem__(name).copy()
        self._lent[name] = weakref.ref(copy)
        return copy

    @property
    def held(self):
        return {name for name, lent in self._lent.items() if lent() is not None}


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_embedding_is_not_held_beside_the_weight_of_the_logits(reference, is_tied):
    model = reference("qwen2") if is_tied else untied(reference("qwen2"))
    weights = Lent(arrays(model.weights))
    lowered = {"layout": model.layout(), "dtype": "float32", "deterministic": False}
    program = CpuBackend().device().lower(build(model.config), weights, **lowered)
    assert isinstance(program, NativeProgram)
    held = {name for name in weights.held if weights[name].ndim > 1}
    assert held == (set() if is_tied else {TABLE})


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_outside_of_the_vocabulary_is_refused(reference, paged, token):
    sequences = native(paged, reference("llama"))
    with pytest.raises(IndexError, match="outside of the vocabulary"):
        sequences.step({"a": [1, token]})


def test_a_program_says_how_it_runs(reference, paged):
    model = reference("llama")
    assert str(native(paged, model).program).startswith("# in one native call\n")
    without = paged(model, CpuBackend(native=False), deterministic=True).program
    assert isinstance(without, CpuProgram)
    assert not str(without).startswith("#")


def test_a_profile_names_each_instruction(reference, paged):
    sequences = native(paged, reference("llama"))
    sequences._grow("a", 3)
    inputs = sequences._inputs({"a": [1, 2, 3]})
    wanted = sequences.run(inputs)
    profile = sequences.program.profile(inputs, array(sequences.pool), 2)
    lines = str(sequences.program).splitlines()[1:]
    assert all(name in line for (name, _), line in zip(profile, lines, strict=True))
    assert all(nanoseconds > 0 for _, nanoseconds in profile)
    assert torch.equal(sequences.run(inputs), wanted)


def test_a_program_finds_the_largest_logit_of_each_row(reference, paged):
    for backend in (CpuBackend(), CpuBackend(native=False)):
        sequences = paged(reference("llama"), backend, deterministic=True)
        sequences._grow("a", 3)
        logits = sequences.run(sequences._inputs({"a": [1, 2, 3]}))
        largest = sequences.program.largest(array(logits))
        assert largest.tolist() == logits.argmax(-1).tolist()


def test_memory_goes_with_the_program(reference, paged, monkeypatch):
    closed = []
    monkeypatch.setattr(type(KERNELS), "close_step", lambda self, step: closed.append(step))
    sequences = native(paged, reference("llama"))
    sequences.step({"a": [1, 2]})
    program = weakref.ref(sequences.program)
    del sequences
    gc.collect()
    assert program() is None
    (step,) = closed
    assert step.memory_bytes > 0
    monkeypatch.undo()
    KERNELS.close_step(step)
    assert (step.memory, step.memory_bytes) == (None, 0)


def test_python_and_c_mean_the_same_structures():
    sizes = (ctypes.c_long * len(c_structs.SIZED))()
    KERNELS._library.sage_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in c_structs.SIZED]


def test_logits_of_a_queue_take_the_memory_of_those_before():
    memory = LogitsMemory()
    first = memory(8, 100_000)
    for num_rows in (1, 8, 3):
        logits = memory(num_rows, 100_000)
        assert (logits.shape, logits.ctypes.data) == ((num_rows, 100_000), first.ctypes.data)
    assert memory(9, 100_000).shape == (9, 100_000)


def test_logits_of_a_long_prompt_are_not_kept(monkeypatch):
    monkeypatch.setattr(program, "_MOST_KEPT", 4 * 800)
    memory = LogitsMemory()
    kept = memory(8, 100)
    assert memory(9, 100).base is None
    assert memory(8, 100).ctypes.data == kept.ctypes.data


def test_a_step_writes_its_logits_where_it_is_told(reference, paged):
    sequences, memory = native(paged, reference("llama")), LogitsMemory()
    wanted = sequences.step({"a": [1, 2, 3]})["a"]
    inputs = sequences._inputs({"a": [1, 2, 3]})
    found = [sequences.program.run(inputs, array(sequences.pool), 1, memory) for _ in range(2)]
    assert np.array_equal(found[1], wanted.numpy())
    assert found[0].ctypes.data == found[1].ctypes.data
