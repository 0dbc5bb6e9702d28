"""Cost models: fitted, of a device's roofline, and from tables."""

import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.graphs.models import ExpertFacts
from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.engine.costs.piecewise import PiecewiseLinear, TimeGrid
from sagellm.runtime.engine.costs.profile import kernel_shape
from sagellm.runtime.engine.costs.roofline import RooflineCost, RooflineForm, RooflineModel
from sagellm.runtime.engine.costs.table import (
    KernelShape,
    TableCost,
    TableError,
    kernel_cost,
    read_kernels,
    read_steps,
)
from sagellm.runtime.engine.step_cost import StepShape, step_shape
from sagellm.runtime.models.shapes import SHAPES

FITTED = FittedCost.of(
    FittedForm(
        1.0, (0.0, 2.0, 4.0), (0.0, 4.0, 6.0), 0.5, (0.0, 30.0, 700.0), (0.0, 7.5, 900.0), 8.0, 16.0
    )
)
DEVICE = RooflineForm(100.0, 10.0, 1e3, 5.0, 0.5, 0.25, 0.5, 1.0, 0.5, 0.1)
ROOFLINE = RooflineCost(DEVICE, RooflineModel(2, 4, 4, 100.0, 10.0, 2.0, 5.0, 2, 2))
TABLE = """kind,tokens,context,batch,seconds
prefill,4,0,1,1.0
prefill,8,0,1,2.0
prefill,4,100,1,2.0
prefill,8,100,1,4.0
decode,1,0,1,1.0
decode,1,100,1,2.0
decode,1,0,4,2.0
decode,1,100,4,6.0
"""
KERNELS = KernelShape(2, 4, 1, 8, ((48, 32), (32, 32)), (100, 32))


def gemm(m, n, k, latency):
    return {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": latency}


def attention(batch, isl, latency, **more):
    heads = {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    return {"batch_size": batch, "isl": isl, **heads, **more, "latency": latency}


GEMM_SIZES = ((48, 32, 1.0), (32, 32, 2.0), (100, 32, 10.0))
GEMMS = [gemm(m, n, k, m * cost) for n, k, cost in GEMM_SIZES for m in (1, 3)]
CONTEXTS = [attention(1, 2, 4.0), attention(2, 4, 32.0)]
GENERATIONS = [attention(b, 1, b * s, step=s - 1) for b in (1, 2) for s in (10, 20)]
KERNEL_COST = kernel_cost(GEMMS, CONTEXTS, GENERATIONS, KERNELS)


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "steps.csv"
    file.write_text(TABLE)
    return read_steps(file)


def test_points_are_joined_by_lines():
    line = PiecewiseLinear((1.0, 3.0), (2.0, 6.0))
    assert [line(x) for x in (0, 1, 2, 3, 4)] == [2.0, 2.0, 4.0, 6.0, 8.0]


def test_points_increase():
    with pytest.raises(ValueError, match="increase"):
        PiecewiseLinear((1.0, 1.0), (0.0, 0.0))


def test_a_grid_mixes_its_neighbours():
    grid = TimeGrid.of([(1, 0, 1.0), (3, 0, 5.0), (3, 10, 15.0), (3, 10, 17.0)])
    assert grid(0, 0) == grid(1, 0) == 1.0
    assert grid(2, 10) == (1.0 + 16.0) / 2
    assert grid(4, 0) == 7.0


def test_a_fitted_step_is_the_sum_of_its_parts():
    shape = StepShape(2, 3, 1, 50, 1, 30)
    assert FITTED.seconds(shape) == 1 + 5.0 + 3 * 0.5 + 20 * 0.25 + 2 * 8 + 16


def test_a_roofline_takes_the_longer_of_arithmetic_and_memory():
    """100 weights of 2 bytes at 5 bytes/s; 2 operations a weight and row at 50 a second."""
    decode = ROOFLINE.seconds(StepShape(0, 0, 1, 3))
    assert decode == pytest.approx(1 + 2 * 0.5 + 200 / 5 + 20 / 5 + 3 * 5 / 5)
    prefill = ROOFLINE.seconds(StepShape(20, 210, 0, 20, 1, 20))
    pairs = 4 * 2 * 4 * 210 / 25
    assert prefill == pytest.approx(2 + 2 * 100 * 20 / 50 + 20 / 5 + pairs)


def test_a_group_splits_layers_and_exchanges_activations():
    group = RooflineCost(DEVICE, ROOFLINE.model, Parallelism(2))
    exchange = 2 * 2 * (0.1 + 4 * 2 * 1.0 / 5)
    expected = 2 + (200 / 5 + 20 / 5 + 15 / 5) / 2 + exchange
    assert group.seconds(StepShape(0, 0, 1, 3)) == pytest.approx(expected)


def test_more_devices_than_kv_heads_keep_copies():
    group = RooflineCost(DEVICE, ROOFLINE.model, Parallelism(4))
    assert group.terms(StepShape(0, 0, 1, 3)).kv_s == pytest.approx(3 * 5 / 5 / 2)


def test_a_pipeline_reads_all_weights_for_each_micro_batch():
    """Two rows take as long as one: each is a micro-batch, in another stage at a time."""
    pipeline = RooflineCost(DEVICE, ROOFLINE.model, Parallelism(1, 2))
    sends = 2 * (0.1 + 4 * 2 / 5)
    assert pipeline.seconds(StepShape(0, 0, 1, 3)) == pytest.approx(2 + 40 + 4 + 3 + sends)
    assert pipeline.seconds(StepShape(0, 0, 2, 6)) == pytest.approx(2 + 40 + 4 + 3 + sends)


def test_a_pipeline_has_a_bubble_in_prefill():
    pipeline = RooflineCost(DEVICE, ROOFLINE.model, Parallelism(1, 2))
    layers = 2 * 100 * 10 / 50 + 20 / 5 + 4 * 2 * 4 * 210 / 25 / 2
    send = 0.1 + 10 * 4 * 2 / 5
    terms = pipeline.terms(StepShape(20, 210, 0, 20, 1, 20))
    assert terms.bubble_s == pytest.approx((layers + 1) / 2 + send)
    assert sum(terms) == pytest.approx(2 + layers + 2 * send + terms.bubble_s)


def test_experts_are_read_if_a_token_takes_them():
    """Two of four experts a token, 80 weights: 40 are read for one token, 60 for two."""
    model = replace(ROOFLINE.model, experts=ExpertFacts(4, 2, 80))
    one, two = (
        RooflineCost(DEVICE, model).terms(StepShape(0, 0, rows, 3 * rows)) for rows in (1, 2)
    )
    assert one.weights_s == pytest.approx((200 + 20 + 40 * 2) / 5)
    assert two.weights_s == pytest.approx((200 + 20 + 60 * 2) / 5)


def test_expert_parallel_devices_read_dense_weights_each_and_send_tokens_there_and_back():
    model = replace(ROOFLINE.model, experts=ExpertFacts(4, 2, 80))
    terms = RooflineCost(DEVICE, model, Parallelism(1, 1, 2)).terms(StepShape(0, 0, 1, 3))
    assert terms.weights_s == pytest.approx((200 + 20 + 80 / 2) / 5)
    assert terms.kv_s == pytest.approx(3 / 2)
    sent = 0.5 * 4 * 2 * 2  # half a token a device, 4 items of 2 bytes, to two experts
    assert terms.exchange_s == pytest.approx(2 * 2 * (0.1 + sent / 2 / 5))


def test_a_table_is_interpolated(table):
    assert table.seconds(step_shape([(50, 6, 100)])) == pytest.approx((1.5 + 3.0) / 2)
    assert table.seconds(StepShape(0, 0, 4, 200)) == pytest.approx(4.0)
    mixed = StepShape(4, 10, 4, 204, 1, 4)
    assert table.seconds(mixed) == pytest.approx(2.0 + 4.0 - 2.0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind,tokens\n", "no column context"),
        (TABLE.replace("decode", "decod"), "decod"),
        (TABLE.replace("1.0", "fast"), "line 2"),
        ("\n".join(TABLE.splitlines()[:5]), "kind decode"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, text, fault):
    file = tmp_path / "steps.csv"
    file.write_text(text)
    with pytest.raises(TableError, match=fault):
        read_steps(file)


def test_kernels_add_up():
    """Rows cost 1 + 2 ms in each of 2 layers, and 10 ms for logits; attention is of both layers."""
    assert KERNEL_COST.seconds(StepShape(0, 0, 2, 30)) == pytest.approx(
        (2 * 2 * 3 + 2 * 10 + 2 * 2 * 15) / 1e3
    )
    assert KERNEL_COST.seconds(step_shape([(2, 2, 4)])) == pytest.approx(
        (2 * 2 * 3 + 10 + 2 * (16.0 - 4.0)) / 1e3
    )


def test_kernels_without_the_heads_of_a_model_are_refused():
    with pytest.raises(TableError, match="5 heads"):
        kernel_cost(GEMMS, CONTEXTS, GENERATIONS, KernelShape(2, 5, 1, 8, ((48, 32),), (100, 32)))


def test_kernel_tables_without_a_column_are_refused():
    with pytest.raises(TableError, match="column latency"):
        kernel_cost([{"gemm_dtype": "bfloat16", "m": 1, "n": 1, "k": 1}], [], [], KERNELS)


def test_parquet_files_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    names = "gemm_perf", "context_attention_perf", "generation_attention_perf"
    for name, rows in zip(names, (GEMMS, CONTEXTS, GENERATIONS), strict=True):
        parquet.write_table(table.from_pylist(rows), tmp_path / f"{name}.parquet")
    shape = StepShape(0, 0, 2, 30)
    assert read_kernels(tmp_path, KERNELS).seconds(shape) == KERNEL_COST.seconds(shape)


def test_parquet_needs_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TableError, match=r"sagellm\[tables\]"):
        read_kernels(tmp_path, KERNELS)


def test_the_kernels_of_a_public_model():
    linears = kernel_shape(SHAPES["qwen2.5-7b"]).linears
    assert linears == ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))


MIXTURE = replace(ROOFLINE.model, experts=ExpertFacts(4, 2, 80))
COSTS = {
    "fitted": FITTED,
    "roofline": ROOFLINE,
    "tensor": RooflineCost(DEVICE, ROOFLINE.model, Parallelism(4)),
    "pipeline": RooflineCost(DEVICE, ROOFLINE.model, Parallelism(2, 4)),
    "experts": RooflineCost(DEVICE, MIXTURE, Parallelism(2, 1, 2)),
    "kernels": KERNEL_COST,
}


@pytest.mark.parametrize("name", [*COSTS, "table"])
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 300))
def test_a_run_costs_what_its_steps_cost(name, contexts, num_steps):
    cost = COSTS.get(name) or _table()

    def shape(step):
        return step_shape((context + step, 1, 0) for context in contexts)

    alone = sum(cost.seconds(shape(step)) for step in range(num_steps))
    assert cost.run_seconds(shape(0), num_steps) == pytest.approx(alone)


# Of a pipeline, tokens that fill another stage may lower the time: sagellm.planning knows that.
@pytest.mark.parametrize("name", [*(one for one in COSTS if one != "pipeline"), "table"])
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 8), st.integers(1, 300))
def test_more_work_takes_no_less_time(name, count, start, decodes, context):
    cost = COSTS.get(name) or _table()

    def seconds(count, start, decodes, context):
        rows = [(start, count, start + count), *[(context, 1, 0)] * decodes]
        return cost.seconds(step_shape(rows)) * (1 + 1e-9)

    base = seconds(count, start, decodes, context)
    assert seconds(count + 1, start, decodes, context) >= base / (1 + 1e-9)
    assert seconds(count, start, decodes, context + 1) >= base / (1 + 1e-9)


def _table():
    rows = [line.split(",") for line in TABLE.splitlines()[1:]]
    prefill, decode = (
        TimeGrid.of(
            (float(row[key]), float(row[2]), float(row[4])) for row in rows if row[0] == kind
        )
        for kind, key in (("prefill", 1), ("decode", 3))
    )
    return TableCost(prefill, decode)
