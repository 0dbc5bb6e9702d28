"""Plans: the order of instructions, the reuse of registers, and when registers are freed."""

from sagellm.backends.instructions import plan_kernels
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.kernels import KV, STEP_INPUTS
from sagellm.graphs.models import build
from sagellm.graphs.passes import KERNEL_PASSES, run_pipeline

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
}


def planned(num_layers):
    return plan_kernels(
        run_pipeline(build({**CONFIG, "num_hidden_layers": num_layers}), KERNEL_PASSES)
    )


def test_no_instruction_reads_a_register_before_it_is_filled():
    found = planned(2)
    filled = set(found.step_inputs.values())
    for instruction in found.instructions:
        assert set(instruction.inputs) <= filled
        filled = (filled | set(instruction.outputs)) - set(instruction.dead)
    assert found.logits in filled


def test_registers_are_reused_so_that_depth_costs_none():
    assert planned(8).num_registers == planned(2).num_registers
    assert planned(2).num_registers <= len(STEP_INPUTS) + 5


def test_only_inputs_and_logits_outlive_the_plan():
    found = planned(2)
    written = [index for step in found.instructions for index in step.outputs]
    dropped = [index for step in found.instructions for index in step.dead]
    assert sorted(written) == sorted([*dropped, found.logits])


def test_the_state_is_never_dropped_nor_written():
    found = planned(1)
    state = found.step_inputs[KV]
    assert all(state not in step.dead + step.outputs for step in found.instructions)


def test_a_result_never_lands_on_an_operand_of_its_own_instruction():
    for step in planned(2).instructions:
        assert not set(step.outputs) & set(step.inputs)


def test_a_wire_read_twice_by_one_node_is_dropped_once():
    embed = Node("embed", "embedding").with_attrs(weight="e", vocab_size=4, size=2, dtype="float32")
    edges = (
        Edge(SOURCE, "embed", "token_ids"),
        Edge("embed", "twice", inlet="a"),
        Edge("embed", "twice", inlet="b"),
        Edge("twice", SINK, inlet="logits"),
        Edge(SOURCE, SINK, KV, KV),
    )
    found = plan_kernels(Graph("small", "kernel", (embed, Node("twice", "add")), edges))
    assert found.instructions[1].dead == found.instructions[0].outputs


def test_instructions_read_as_text():
    first = str(planned(1)).splitlines()[0]
    assert first == f"%{len(STEP_INPUTS)} = embedding(%0)  # embed"
