"""The native step: threads wait before they touch a buffer that another still uses, nothing that is
still read is overwritten, and a plan that C would misread is not translated.
"""

import pytest

from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.binding import NativeKernel
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.native_forms import NoNativeForm
from sagellm.backends.cpu.program import NativeProgram
from sagellm.backends.cpu.translation import _OPS, translate
from sagellm.backends.instructions import Instruction, KernelPlan
from sagellm.graphs.ir import Node
from sagellm.graphs.kernels import STEP_INPUTS

FAMILIES = ["llama", "mistral", "qwen2_sliding", "qwen3"]


def touched(instruction):
    """What an instruction reads and writes: buffers by their offset, and layers of the pool."""
    read = {view.first for view in instruction.inlets if view.width}
    written = {view.first for view in instruction.outlets if view.width}
    op = _OPS[instruction.op]
    if op in ("kv_write", "rope_kv_write"):
        written.add(("pool", instruction.layer))
    if op == "paged_attention":
        read.add(("pool", instruction.layer))
    return read, written


@pytest.mark.skipif(native_kernels() is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("passes", [None, ()], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_written_that_others_use_without_a_wait_between(
    reference, paged, family, passes
):
    backend = CpuBackend() if passes is None else CpuBackend(passes=passes)
    program = paged(reference(family), backend, deterministic=True).program
    assert isinstance(program, NativeProgram)
    since_read, since_written = set(), set()
    for instruction in program._translation.instructions:
        if instruction.waits:
            since_read, since_written = set(), set()
        read, written = touched(instruction)
        assert not since_written & (read | written)
        assert not since_read & written
        since_read |= read
        since_written |= written


INPUTS = {name: index for index, name in enumerate(STEP_INPUTS)}
A, B, C = range(len(INPUTS), len(INPUTS) + 3)  # registers behind those of the step's inputs
EMBED = ("embedding", ("token_ids",), (A,), ())


def translated(*steps, logits=C):
    """Instructions of (op, inputs, outputs, dead): inputs by name or register."""
    made = [
        Instruction(Node(op, op), tuple(INPUTS.get(i, i) for i in inputs), outputs, dead)
        for op, inputs, outputs, dead in steps
    ]
    kernels = [NativeKernel(widths=(8,)) for _ in made]
    plan = KernelPlan(tuple(made), INPUTS, logits, len(INPUTS) + 3)
    return translate(plan, kernels).instructions


def test_a_result_takes_the_place_of_what_nothing_reads_any_more():
    last = ("add", (B, B), (C,), (B,))
    _, dead, _ = translated(EMBED, ("silu", (A,), (B,), (A,)), last)
    assert dead.outlets[0].first == dead.inlets[0].first
    _, read_again, _ = translated(EMBED, ("silu", (A,), (B,), ()), ("add", (A, B), (C,), (A, B)))
    assert read_again.outlets[0].first != read_again.inlets[0].first


def test_a_result_is_not_written_over_a_matrix_that_is_read_twice():
    _, twice, _ = translated(EMBED, ("add", (A, A), (B,), (A,)), ("silu", (B,), (C,), (B,)))
    assert twice.outlets[0].first != twice.inlets[0].first == twice.inlets[1].first


SELECT = ("select_rows", (A, "logit_rows"), (B,), (A,))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([("embedding", ("positions",), (C,), ())], "in is not token_ids"),
        ([EMBED, ("select_rows", (A, "slots"), (C,), (A,))], "rows is not logit_rows"),
        ([EMBED, SELECT, ("rope", (B, "positions"), (C,), (B,))], "reads rows of logits"),
        ([EMBED, ("silu", (A,), (B,), (A,))], "logits are not the last result"),
        ([EMBED, ("add", (A, "positions"), (C,), (A,))], "an input of the step in another way"),
    ],
    ids=["embedding", "rows", "rope", "logits", "input"],
)
def test_what_c_would_misread_is_left_to_the_kernels_one_by_one(steps, reason):
    with pytest.raises(NoNativeForm, match=reason):
        translated(*steps)
