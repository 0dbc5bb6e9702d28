"""Placements: which there are, and their graphs."""

import pytest
from plan_tasks import plan_task

from sagellm.planning.layouts import Placement, Pool, advised, groups, layouts
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.models.shapes import SHAPES
from sagellm.simulation.simulation_run import SimulationPoint, modelled_graph

DENSE, MIXTURE = SHAPES["llama-3-8b"], SHAPES["mixtral-8x7b"]
ONE, TP2, PP2 = Parallelism(), Parallelism(2), Parallelism(1, 2)


def test_groups_are_powers_of_two():
    assert {group.name for group in groups(4, DENSE)} == {
        "TP1",
        "TP2",
        "TP4",
        "PP2",
        "PP4",
        "TP2 x PP2",
    }


def test_only_a_mixture_has_expert_groups():
    assert {"EP2", "TP2 x EP2", "EP4"} < {group.name for group in groups(4, MIXTURE)}


def test_layouts_use_all_devices():
    found = [Placement(pools) for pools in layouts(4, (ONE, TP2, PP2))]
    assert {one.num_gpus for one in found} == {4}
    assert {one.layout for one in found if not one.is_split} == {"4 x TP1", "2 x TP2", "2 x PP2"}
    split = {one.layout for one in found if one.is_split}
    assert {"P: TP1, D: 3 x TP1", "P: TP2, D: 2 x TP1", "P: 3 x TP1, D: TP1"} < split
    assert len(split) == 1 + 2 * 2 + 1
    assert not any("PP" in name for name in split)


@pytest.mark.parametrize(
    ("billions", "names"),
    [
        (7, ["TP1", "TP2"]),
        (13, ["TP4"]),
        (34, ["TP4", "TP8"]),
        (72, ["TP4 x PP2"]),
        (405, ["TP8 x PP4"]),
    ],
)
def test_the_published_advice(billions, names):
    assert [group.name for group in advised(int(billions * 1e9))] == names


@pytest.mark.parametrize(
    ("pools", "operators"),
    [
        ((Pool(TP2, 2),), {"generate"}),
        ((Pool(ONE, 1), Pool(TP2, 1)), {"prefill", "kv_transfer", "decode"}),
    ],
)
def test_a_placement_is_a_graph_that_the_check_accepts(pools, operators):
    task = plan_task()
    placement = Placement(pools, 64, 512, "slo_aware")
    graph = modelled_graph(SimulationPoint(task.graph(placement).document, task.workload))
    assert operators < {node.op for node in graph.nodes}
    assert graph.node("admission").attrs["slo_ttft_s"] == 0.2


def test_a_split_computes_answers_in_the_second_pool():
    engines = plan_task().engines(Placement((Pool(ONE, 1), Pool(TP2, 3)), 64, 2048))
    assert engines["p"]["replicas"] == 1
    assert engines["p"]["max_num_batched_tokens"] == 2048
    assert engines["d"]["tensor_parallel_size"] == 2
    assert (engines["d"]["replicas"], engines["d"]["max_num_seqs"]) == (3, 64)
