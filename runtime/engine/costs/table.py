"""The cost of a step from tables of measured times: our own CSV, and tables of kernels."""

import csv
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from sagellm.runtime.engine.costs.piecewise import PiecewiseLinear, TimeGrid
from sagellm.runtime.engine.step_cost import StepShape

COLUMNS = ("kind", "tokens", "context", "batch", "seconds")
_KINDS = ("prefill", "decode")


class TableError(ValueError):
    """A table of times cannot be read. The message names the file and the fault."""


class TableForm(msgspec.Struct, frozen=True, tag_field="form", tag="table"):
    """A file of times, beside the profile: a CSV of steps, or a folder of Parquet files of kernels.
    `step_s`: a fixed time of each step, which the times lack.
    """

    file: str
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TableCost:
    """Implements CostModel by interpolation. `prefill`: seconds by tokens and the tokens before
    them. `decode`: seconds by number of sequences and mean context.

    A step with both costs as much as a prefill of all its tokens, and the cost of its decodes
    beyond that of equally many with the shortest context in the table. Several prompts cost as much
    as one of equally many tokens and pairs.
    """

    prefill: TimeGrid
    decode: TimeGrid
    step_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        rows = shape.num_decode_rows
        context = shape.num_decode_context_tokens / rows if rows else 0.0
        if not shape.num_prefill_tokens:
            return self.step_s + (self.decode(rows, context) if rows else 0.0)
        mean_pairs = shape.num_prefill_pairs / shape.num_prefill_tokens
        before = max(0.0, mean_pairs - (shape.num_prefill_tokens + 1) / 2)
        seconds = self.step_s + self.prefill(shape.num_tokens, before)
        if rows:
            seconds += max(0.0, self.decode(rows, context) - self.decode(rows, 0.0))
        return seconds

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        rows = first.num_decode_rows
        if not rows or first.num_prefill_tokens:
            return num_steps * self.seconds(first)
        context = first.num_decode_context_tokens / rows
        return num_steps * self.step_s + self.decode.total(rows, context, num_steps)


def read_steps(file: Path, step_s: float = 0.0) -> TableCost:
    """The cost of a CSV of steps with COLUMNS, seconds of whole steps.

    A row of kind `prefill` has `batch` prompts of `tokens` tokens after `context` tokens each; a
    row of kind `decode`, `batch` sequences with contexts of `context` tokens. Raises TableError.
    """
    points: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in _KINDS}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise TableError(f"{file}: no column {missing[0]}; there must be {COLUMNS}")
            for row in rows:
                kind, point = _point(file, rows.line_num, row)
                points[kind].append(point)
    except OSError as error:
        raise TableError(f"{file}: {error.strerror}") from None
    if empty := [kind for kind in _KINDS if not points[kind]]:
        raise TableError(f"{file}: there is no row of kind {empty[0]}")
    return TableCost(TimeGrid.of(points["prefill"]), TimeGrid.of(points["decode"]), step_s)


def _point(file: Path, line: int, row: Mapping[str, str]) -> tuple[str, tuple[float, float, float]]:
    """The kind of a row, and its point of the grid of that kind. Raises TableError."""
    try:
        tokens, context, batch = (float(row[name]) for name in ("tokens", "context", "batch"))
        seconds = float(row["seconds"])
    except (TypeError, ValueError):
        raise TableError(f"{file}, line {line}: numbers are missing or no numbers") from None
    kind = row["kind"]
    if kind == "decode":
        return kind, (batch, context, seconds)
    if kind != "prefill":
        raise TableError(f"{file}, line {line}: kind {kind!r} is unknown; use prefill or decode")
    whole = batch * tokens
    # One prompt of all tokens has as many pairs as the prompts of the row.
    before = max(0.0, context + (tokens + 1) / 2 - (whole + 1) / 2)
    return kind, (whole, before, seconds)


# ---- tables of kernels, in the columns of aiconfigurator ----------------------------------------

GEMM, CONTEXT, GENERATION = (
    "gemm_perf",
    "context_attention_perf",
    "generation_attention_perf",
)
_GEMM_COLUMNS = ("gemm_dtype", "m", "n", "k", "latency")
_CONTEXT_COLUMNS = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "latency")
_GENERATION_COLUMNS = (*_CONTEXT_COLUMNS[:-1], "step", "latency")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class KernelShape:
    """The sizes of a dense model on one of `num_devices` devices. `linears`: outputs and inputs of
    each linear of a layer.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linears: tuple[tuple[int, int], ...]
    logits: tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Implements CostModel from times of kernels: linears by rows, prefill attention by the length
    of a prompt, decode attention by sequences and context. All are seconds of all layers.
    """

    linears: PiecewiseLinear
    logits: PiecewiseLinear
    prefill: PiecewiseLinear
    decode: TimeGrid
    step_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds. A prompt after cached tokens costs as much as all,
        less the cached.
        """
        if not shape.num_rows:
            return self.step_s
        seconds = self.step_s + self.linears(shape.num_tokens) + self.logits(shape.num_rows)
        tokens = shape.num_prefill_tokens
        if tokens:
            prompts = max(1, shape.num_prefill_rows)
            each = tokens / prompts
            before = max(0.0, shape.num_prefill_pairs / tokens - (each + 1) / 2)
            longer = self.prefill(before + each) - (self.prefill(before) if before else 0.0)
            seconds += prompts * max(0.0, longer)
        rows = shape.num_decode_rows
        if rows:
            seconds += self.decode(rows, shape.num_decode_context_tokens / rows)
        return seconds

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        rows = first.num_decode_rows
        if not rows or first.num_prefill_tokens:
            return num_steps * self.seconds(first)
        context = first.num_decode_context_tokens / rows
        fixed = self.step_s + self.linears(first.num_tokens) + self.logits(first.num_rows)
        return num_steps * fixed + self.decode.total(rows, context, num_steps)


def read_kernels(folder: Path, shape: KernelShape, step_s: float = 0.0) -> KernelCost:
    """The cost from the Parquet files GEMM, CONTEXT and GENERATION of a folder. Raises TableError,
    also without the package pyarrow.
    """
    gemms, contexts, generations = (
        _read_parquet(folder / f"{name}.parquet") for name in (GEMM, CONTEXT, GENERATION)
    )
    try:
        return kernel_cost(gemms, contexts, generations, shape, step_s)
    except TableError as error:
        raise TableError(f"{folder}: {error}") from None


def _read_parquet(file: Path) -> Rows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")  # an extra
    except ImportError:
        raise TableError(
            f"{file}: Parquet files need the package pyarrow; pip install 'sagellm[tables]'"
        ) from None
    try:
        rows: Rows = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise TableError(f"{file}: {error}") from None
    return rows


def kernel_cost(
    gemms: Rows, contexts: Rows, generations: Rows, shape: KernelShape, step_s: float = 0.0
) -> KernelCost:
    """The cost from rows of the three tables; latencies are milliseconds. Raises TableError."""
    _check_columns(GEMM, gemms, _GEMM_COLUMNS)
    _check_columns(CONTEXT, contexts, _CONTEXT_COLUMNS)
    _check_columns(GENERATION, generations, _GENERATION_COLUMNS)
    gemms = [row for row in gemms if str(row["gemm_dtype"]) in ("bfloat16", "float16")]
    layers = [_linear(gemms, n, k) for n, k in shape.linears]
    prefills = _of_heads(CONTEXT, contexts, shape)
    ones = [(row["isl"], 0.0, _layers_s(row, shape) / row["batch_size"]) for row in prefills]
    lengths = TimeGrid.of(ones)
    decodes = _of_heads(GENERATION, generations, shape)
    return KernelCost(
        _summed(layers, shape.num_layers),
        _linear(gemms, *shape.logits),
        PiecewiseLinear((0.0, *lengths.at), (0.0, *(one.values[0] for one in lengths.functions))),
        TimeGrid.of(
            (row["batch_size"], row["isl"] + row["step"], _layers_s(row, shape)) for row in decodes
        ),
        step_s,
    )


def _check_columns(name: str, rows: Rows, columns: Iterable[str]) -> None:
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise TableError(f"{name}: there are no rows with a column {missing[0]}")


def _linear(gemms: Rows, n: int, k: int) -> PiecewiseLinear:
    """Seconds of a linear by rows. Without its sizes, the nearest are scaled by their weights."""
    sizes = {(int(row["n"]), int(row["k"])) for row in gemms}
    if not sizes:
        raise TableError(f"{GEMM}: there is no row in bfloat16 or float16")
    nearest = min(sizes, key=lambda size: (abs(size[0] * size[1] - n * k), abs(size[0] - n)))
    scale = n * k / (nearest[0] * nearest[1]) / 1e3
    points = [
        (int(row["m"]), float(row["latency"]) * scale)
        for row in gemms
        if (int(row["n"]), int(row["k"])) == nearest
    ]
    best = {m: min(value for _, value in same) for m, same in groupby(sorted(points), _first)}
    return PiecewiseLinear(tuple(map(float, best)), tuple(best.values()))


def _first(point: tuple[int, float]) -> int:
    return point[0]


def _summed(functions: Sequence[PiecewiseLinear], times: int) -> PiecewiseLinear:
    at = sorted({x for one in functions for x in one.at})
    return PiecewiseLinear(tuple(at), tuple(times * sum(one(x) for one in functions) for x in at))


def _of_heads(name: str, rows: Rows, shape: KernelShape) -> Rows:
    """The rows of attention with the heads of a model, without a window. Raises TableError."""
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
    found = [
        row
        for row in rows
        if (row["num_heads"], row["num_key_value_heads"], row["head_dim"]) == sizes
        and not row.get("window_size")
        and str(row.get("kv_cache_dtype", "bfloat16")) in ("bfloat16", "float16")
    ]
    if not found:
        heads = f"{sizes[0]} heads, {sizes[1]} KV heads and {sizes[2]} dimensions"
        raise TableError(f"{name}: there is no row for {heads}")
    return found


def _layers_s(row: Mapping[str, Any], shape: KernelShape) -> float:
    return float(row["latency"]) * shape.num_layers / 1e3
