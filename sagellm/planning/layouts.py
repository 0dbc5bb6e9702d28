"""Placements: how the devices of a machine serve a model, and the graph of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from sagellm import ops
from sagellm.builder import Graph
from sagellm.graphs.models import ModelFacts
from sagellm.runtime.engine.costs.parallel import Parallelism

FIFO = "fifo"
_MAX_QUEUED, _MAX_INFLIGHT = 1_000_000, 64  # nothing is refused for a full queue


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal replicas, each of a group of devices."""

    group: Parallelism
    replicas: int

    @property
    def num_devices(self) -> int:
        return self.group.num_devices * self.replicas

    @property
    def name(self) -> str:
        return f"{self.replicas} x {self.group.name}" if self.replicas > 1 else self.group.name


@dataclass(frozen=True, slots=True)
class Placement:
    """One pool that computes prompts and answers, or a pool for prompts and one for answers.

    `max_num_seqs`: of the pool that computes answers. `max_num_batched_tokens`: of the pool that
    computes prompts. `policy`: the order of waiting requests.
    """

    pools: tuple[Pool, ...]
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: str = FIFO

    @property
    def is_split(self) -> bool:
        return len(self.pools) > 1

    @property
    def num_gpus(self) -> int:
        return sum(pool.num_devices for pool in self.pools)

    @property
    def engines(self) -> Mapping[str, Pool]:
        """The pools by the names of their engines."""
        names = ("p", "d") if self.is_split else ("g",)
        return dict(zip(names, self.pools, strict=True))

    @property
    def layout(self) -> str:
        """Its pools, such as "2 x TP2" or "P: TP2, D: 2 x TP1"."""
        if not self.is_split:
            return self.pools[0].name
        return f"P: {self.pools[0].name}, D: {self.pools[1].name}"

    @property
    def name(self) -> str:
        limits = f"{self.max_num_seqs} seqs, {self.max_num_batched_tokens} tokens"
        return f"{self.layout}; {limits}; {self.policy}"


@dataclass(frozen=True, slots=True)
class SearchAxes:
    """The values of each option that are searched."""

    max_num_seqs: tuple[int, ...] = (64, 256)
    max_num_batched_tokens: tuple[int, ...] = (512, 2048, 8192)
    policies: tuple[str, ...] = (FIFO, "slo_aware")


def groups(num_gpus: int, facts: ModelFacts) -> Iterator[Parallelism]:
    """Every group of at most `num_gpus` devices: powers of two of tensor and pipeline parallelism,
    and of experts where there are any. Pipelines of expert groups are not among them.
    """
    powers = [2**n for n in range(num_gpus.bit_length())]
    experts = powers if facts.experts is not None else [1]
    for tensor, pipeline, expert in product(powers, powers, experts):
        group = Parallelism(tensor, pipeline, expert)
        if group.num_devices <= num_gpus and (pipeline == 1 or expert == 1):
            yield group


def layouts(num_gpus: int, usable: tuple[Parallelism, ...]) -> Iterator[tuple[Pool, ...]]:
    """The pools of all placements of exactly `num_gpus` devices in these groups. Prompts and
    answers are split between pools without pipelines only.
    """
    yield from ((pool,) for pool in _pools(num_gpus, usable))
    unpiped = tuple(group for group in usable if group.pipeline == 1)
    for num_prefill in range(1, num_gpus):
        prefills = list(_pools(num_prefill, unpiped))
        yield from product(prefills, _pools(num_gpus - num_prefill, unpiped))


def _pools(num_gpus: int, usable: tuple[Parallelism, ...]) -> Iterator[Pool]:
    for group in usable:
        if num_gpus % group.num_devices == 0:
            yield Pool(group, num_gpus // group.num_devices)


def advised(num_parameters: int) -> tuple[Parallelism, ...]:
    """The published advice for a model of this size; one of them, where it has two."""
    billions = num_parameters / 1e9
    if billions < 10:
        return Parallelism(1), Parallelism(2)
    if billions < 30:
        return (Parallelism(4),)
    if billions < 70:
        return Parallelism(4), Parallelism(8)
    return (Parallelism(4, 2) if billions < 175 else Parallelism(8, 4),)


def graph_of(
    placement: Placement,
    engines: Mapping[str, Mapping[str, Any]],
    *,
    slo_ttft_s: float | None,
    shares_prefixes: bool,
) -> Graph:
    """The graph of a placement. `engines`: the options of each engine. With another policy than
    fifo, requests have the objective `slo_ttft_s`, and those that cannot meet it are refused.
    """
    graph = Graph("plan")
    for name, options in engines.items():
        graph.engine(name, **options)
    objective = {} if placement.policy == FIFO or not slo_ttft_s else {"slo_ttft_s": slo_ttft_s}
    graph >> ops.admission(max_queued=_MAX_QUEUED, **objective)
    graph >> ops.policy_sort(placement.policy)
    graph >> ops.route("prefix_aware" if shares_prefixes else "load_balanced")
    if placement.is_split:
        graph >> ops.prefill(engine="p") >> ops.kv_transfer(max_inflight=_MAX_INFLIGHT)
        graph >> ops.decode(engine="d")
    else:
        graph >> ops.generate(engine="g")
    graph >> ops.metrics_sink()
    return graph
