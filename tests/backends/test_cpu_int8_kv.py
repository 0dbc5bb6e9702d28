"""Keys and values in 8 bits: what is written, how far logits are, and that C and torch agree."""

import pytest
import torch

from sagellm.backends import KVLayout
from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.attention import dequantised, quantised
from sagellm.backends.cpu.kv_storage import CpuStorage
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.program import NativeProgram
from sagellm.backends.cpu.torch_linear import array, tensor

KERNELS = native_kernels()
in_c = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
FAMILIES = pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2_sliding", "qwen3"])
BACKENDS = pytest.mark.parametrize("native", [True, False], ids=["C", "torch"])


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (count,), generator=generator).tolist()


def sequences(paged, model, native=True, dtype="float32", kv_cache_dtype="int8"):
    backend = CpuBackend(native=native)
    return paged(model, backend, dtype=dtype, deterministic=True, kv_cache_dtype=kv_cache_dtype)


def write(rows, head_dim, pool, slots, layer):
    """Write rows as keys and values by C, without a rotation."""
    count = len(rows)
    still = torch.stack([torch.ones(count, head_dim // 2), torch.zeros(count, head_dim // 2)], 1)
    places = {"tables": still, "positions": torch.arange(count), "slots": slots, "pool": pool}
    given = {name: array(found) for name, found in places.items()}
    KERNELS.rope_kv_write(*[array(rows)] * 3, **given, layer=layer)


def test_a_number_is_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    rows = torch.randn(500, 64) * torch.logspace(-10, 10, 500)[:, None]
    found = dequantised(quantised(rows))
    step = rows.abs().amax(-1, keepdim=True) / 127
    # The scale is rounded to bfloat16, by 1/256 at most: half of the step, and the largest code.
    assert ((found - rows).abs() <= step * (0.5 + 0.5 / 256 + 1e-3)).all()


def test_zeros_and_numbers_without_an_inverse_become_zeros():
    rows = torch.stack([torch.zeros(8), torch.full((8,), 1e-38), torch.full((8,), -1e-45)])
    assert not dequantised(quantised(rows)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_does_not_look_finite(value):
    rows = torch.ones(2, 13)
    rows[1, 12] = value
    found = dequantised(quantised(rows))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@in_c
@pytest.mark.parametrize("head_dim", [8, 10, 24, 128])
def test_c_writes_the_codes_and_scales_of_torch(head_dim):
    torch.manual_seed(1)
    rows = torch.randn(9, 2 * head_dim) * torch.logspace(-3, 3, 9)[:, None]
    rows[3], rows[4] = 0.0, 1e-38
    layout = KVLayout(2, 2, head_dim, 4, "int8")
    pool, slots = tensor(CpuBackend().device().allocate(layout, 5).pool), torch.arange(3, 12)
    write(rows, head_dim, pool, slots, layer=1)
    for side in (0, 1):
        written = pool[1, side, slots // 4, :, slots % 4]
        assert torch.equal(written, quantised(rows.view(9, 2, head_dim)))
    assert not pool[0].any()


@in_c
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("number", [3, 23], ids=["in a vector", "in the rest"])
def test_c_marks_a_row_that_is_not_finite(value, number):
    rows = torch.ones(2, 20)
    rows[1, number % 20] = value
    pool = tensor(CpuBackend().device().allocate(KVLayout(1, 1, 20, 4, "int8"), 1).pool)
    write(rows, 20, pool, torch.arange(2), layer=0)
    written = dequantised(pool[0, 1, 0, 0, :2])
    assert written[0].isfinite().all()
    assert written[1].isnan().all()


@in_c
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_c_stores_nan_of_any_bits_as_nan(dtype):
    """Rounding would turn 0xffffffff into zero."""
    rows = torch.ones(2, 16)
    rows.view(torch.int32)[1, 5] = -1
    pool = tensor(CpuBackend().device().allocate(KVLayout(1, 1, 16, 4, dtype), 1).pool)
    write(rows, 16, pool, torch.arange(2), layer=0)
    written = pool[0, 1, 0, 0, :2]
    numbers = dequantised(written) if dtype == "int8" else written.float()
    assert numbers[1, 5].isnan()
    assert numbers[0].isfinite().all()


@BACKENDS
@FAMILIES
def test_logits_stay_near_those_of_float32(reference, paged, family, native):
    model, prompt = reference(family), tokens(60, seed=2)
    found = sequences(paged, model, native).step({"a": prompt})["a"]
    wanted = model.logits(prompt)
    assert 0 < (found - wanted).norm() < 0.03 * wanted.norm()


@BACKENDS
def test_a_decoded_token_reads_what_the_prompt_wrote(reference, paged, native):
    model, prompt = reference("qwen3"), tokens(70, seed=3)
    whole = sequences(paged, model, native).step({"a": prompt})["a"]
    parts = sequences(paged, model, native)
    parts.step({"a": prompt[:69]})
    assert torch.equal(parts.step({"a": prompt[69:]})["a"][0], whole[-1])


@in_c
@FAMILIES
def test_one_native_call_agrees_with_torch(reference, paged, family):
    model = reference(family)
    step, in_torch = sequences(paged, model), sequences(paged, model, native=False)
    assert isinstance(step.program, NativeProgram)
    for batch in ({"a": tokens(30, 1), "b": [5]}, {"a": [1], "c": tokens(40, 2)}, {"b": [3]}):
        found, wanted = step.step(batch), in_torch.step(batch)
        for name in batch:
            # A code may differ by one where sums round differently.
            assert (found[name] - wanted[name]).norm() < 0.02 * wanted[name].norm()


@in_c
@FAMILIES
def test_kernel_by_kernel_has_the_bits_of_one_native_call(reference, paged, kept_threads, family):
    model = reference(family)
    step = sequences(paged, model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sagellm.backends.cpu.program.NATIVE_FORMS", {})
        kernels = sequences(paged, model)
    assert isinstance(step.program, NativeProgram)
    assert not isinstance(kernels.program, NativeProgram)
    for threads, batch in enumerate(({"a": tokens(30, 1), "b": [5]}, {"a": [1], "b": [3]}), 1):
        torch.set_num_threads(threads)
        found, wanted = step.step(batch), kernels.step(batch)
        assert all(torch.equal(found[name], wanted[name]) for name in batch)
    used = [block for blocks in step.blocks.values() for block in blocks]
    assert torch.equal(step.pool[:, :, used], kernels.pool[:, :, used])


@pytest.mark.parametrize("head_dim", [64, 13])
def test_a_pool_knows_its_layout_and_true_size(head_dim):
    layout = KVLayout(3, 2, head_dim, 16, "int8")
    storage = CpuBackend().device().allocate(layout, 7)
    assert storage.layout == layout
    assert storage.pool.shape == layout.pool_shape(7)
    assert storage.pool.nbytes == 7 * layout.block_bytes
    assert layout.block_bytes == 3 * 2 * 2 * 16 * (head_dim + 2)
    assert storage.register().num_bytes == storage.pool.nbytes


@pytest.mark.parametrize("block_size", [16, 3], ids=["summed in C", "summed in Python"])
def test_blocks_move_between_pools_bit_for_bit(block_size):
    layout = KVLayout(3, 2, 64, block_size, "int8")
    left, right = (CpuBackend().device().allocate(layout, 8) for _ in range(2))
    assert isinstance(left, CpuStorage)
    tensor(left.pool).random_(-127, 127)
    pairs, layers = [(slice(1, 4), slice(4, 7))], range(1, 3)
    found = right.receive(memoryview(left.pool).cast("B"), pairs, layers)
    assert found == left.checksum([slice(1, 4)], layers) == right.checksum([slice(4, 7)], layers)
    assert (right.pool[1:, :, 4:7] == left.pool[1:, :, 1:4]).all()
    assert not right.pool[0].any()
