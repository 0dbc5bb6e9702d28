"""What fits the memory of devices, by hand."""

import pytest
from plan_tasks import plan_task

from sagellm.load.traces import PlannedRequest
from sagellm.planning.layouts import Placement, Pool
from sagellm.planning.plan_task import check_lengths
from sagellm.planning.service_level import PlanError
from sagellm.runtime.engine.costs.parallel import Parallelism

REQUESTS = [PlannedRequest(0.0, 1000, 100), PlannedRequest(1.0, 2000, 50)]


def fit(model, *group):
    return plan_task(model, workload=REQUESTS).fit(Parallelism(*group))


def test_weights_and_kv_of_one_device():
    """Llama-3-8B: 8,030,261,248 weights of 2 bytes; KV of 32 layers, 8 heads of 128, twice."""
    found = fit("llama-3-8b")
    assert found.weight_bytes == 2 * 8_030_261_248
    assert found.num_tokens == int((72e9 - 16_060_522_496) / (2 * 2 * 32 * 8 * 128))
    assert found.num_blocks == found.num_tokens // 16
    assert found.misfit == ""


def test_a_group_splits_weights_and_kv():
    one, two = fit("llama-3-8b"), fit("llama-3-8b", 2)
    assert two.weight_bytes == one.weight_bytes / 2
    assert two.num_tokens == int((72e9 - one.weight_bytes / 2) / (131072 / 2))


def test_more_devices_than_kv_heads_keep_copies():
    """Llama-3-8B has 8 KV heads, Qwen2.5-7B 4; two stages have 14 of its 28 layers each."""
    sixteen = fit("llama-3-8b", 16)
    assert sixteen.num_tokens == int((72e9 - sixteen.weight_bytes) / (131072 / 8))
    layer_bytes = 2 * 2 * 4 * 128
    staged = fit("qwen2.5-7b", 4, 2)
    assert staged.num_tokens == int((72e9 - staged.weight_bytes) / (14 * layer_bytes / 4))
    assert fit("qwen2.5-7b", 8).misfit == "TP8 does not divide 28 attention heads"


def test_a_stage_has_its_layers_and_one_table():
    table = 128256 * 4096 * 2
    layers = 2 * 8_030_261_248 - 2 * table
    assert fit("llama-3-8b", 1, 2).weight_bytes == layers / 2 + table


def test_experts_are_on_devices_and_dense_weights_on_each():
    """Mixtral: 45,097,156,608 weights of experts; 8 groups hold an eighth of them each."""
    found = fit("mixtral-8x7b", 1, 1, 8)
    assert found.weight_bytes == 2 * (46_702_792_704 - 45_097_156_608 * 7 / 8)
    assert found.num_blocks == found.num_tokens // 16 * 8


def test_what_does_not_fit_says_why():
    assert fit("llama-3-70b").misfit == "weights take 141.1 GB of 72.0 GB a device"
    assert fit("llama-3-8b", 1, 1, 2).misfit.startswith("EP2 needs a mixture")
    long = plan_task("llama-3-70b", workload=[PlannedRequest(0.0, 20_000, 100)])
    assert "one request needs 20128" in long.fit(Parallelism(2)).misfit


def test_prompts_that_share_blocks_have_larger_ones():
    shared = [PlannedRequest(0.0, 600, 10, (1,)), PlannedRequest(1.0, 600, 10, (1,))]
    task = plan_task(workload=shared)
    assert (task.block_size, task.max_model_len) == (64, 640)
    route = task.graph(Placement((Pool(Parallelism(), 2),))).ir.node("route")
    assert route.attrs["strategy"] == "prefix_aware"


def test_requests_beyond_the_context_of_a_model_are_refused():
    task = plan_task(workload=REQUESTS)
    check_lengths(task, None)
    with pytest.raises(PlanError, match="up to 2064") as error:
        check_lengths(task, 2000)
    assert "--max-input-len" in error.value.fix


def test_costs_are_seconds_of_a_device_without_a_price():
    placement = Placement((Pool(Parallelism(2), 3),))
    assert plan_task().prices(placement) == {"g": 2 * 3600.0}
