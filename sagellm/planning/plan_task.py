"""The task of a plan: a model, its devices and its requests; and what fits their memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sagellm.builder import Graph
from sagellm.graphs.models import ModelFacts
from sagellm.load.traces import BLOCK_LEN, PlannedRequest
from sagellm.planning.layouts import Placement, Pool, graph_of
from sagellm.planning.service_level import PlanError, ServiceLevel
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.engine.costs.profile import Profile
from sagellm.runtime.engine.costs.roofline import RooflineForm
from sagellm.runtime.engine.kinds.modelled import ModelledOptions
from sagellm.runtime.engine.sizing import kv_blocks, weight_bytes
from sagellm.runtime.engine.step_cost import CostModel
from sagellm.simulation.simulation_run import SimulationPoint
from sagellm.simulation.sweep import SweepPoint

_BLOCK, _SHARED_BLOCK = 16, 64  # tokens; the second where prompts share blocks
_SECONDS_OF_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The memory of one device of a group, in bytes, and the KV pool of a replica.

    `budget_bytes`: what may be used. `weight_bytes`: of the device with the most weights.
    `num_tokens`: that the pool of one device, or of devices that split layers, holds. `misfit`: why
    the group cannot serve the model; empty if it can.
    """

    budget_bytes: float
    weight_bytes: float
    num_tokens: int
    num_blocks: int
    misfit: str = ""


@dataclass(frozen=True)
class PlanTask:
    """A model on devices of one type, with the requests of a trace and a service level.

    `profile_name`: a shipped profile or a file, of which `profile` is the content. `memory_bytes`:
    of one device, of which the share `memory_utilization` may be used. `kv_bytes_per_s`: of one
    device to the device of another pool. `price`: of a device's hour; None: costs are in seconds of
    a device.
    """

    model: str
    facts: ModelFacts
    profile_name: str
    profile: Profile
    memory_bytes: float
    memory_utilization: float
    kv_bytes_per_s: float
    level: ServiceLevel
    workload: Sequence[PlannedRequest]
    price: float | None = None

    @property
    def is_roofline(self) -> bool:
        return isinstance(self.profile.cost, RooflineForm)

    @cached_property
    def shares_prefixes(self) -> bool:
        return any(one.block_ids for one in self.workload)

    @property
    def block_size(self) -> int:
        return _SHARED_BLOCK if self.shares_prefixes else _BLOCK

    @cached_property
    def max_model_len(self) -> int:
        """Tokens of the longest request, in whole blocks."""
        longest = max(one.input_len + one.output_len for one in self.workload)
        return -(-longest // self.block_size) * self.block_size

    def options(self, pool: Pool, seqs: int, tokens: int) -> dict[str, Any]:
        """The options of the engine of a pool that fits."""
        group, dtype = pool.group, "bfloat16" if self.facts.dtype == "float16" else None
        sizes = {
            "tensor_parallel_size": group.tensor,
            "pipeline_parallel_size": group.pipeline,
            "expert_parallel_size": group.expert,
        }
        return {
            "kind": "modelled",
            "model": self.model,
            "profile": self.profile_name,
            **({"dtype": dtype} if dtype else {}),
            "replicas": pool.replicas,
            **{name: number for name, number in sizes.items() if number > 1},
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "num_blocks": self.fit(group).num_blocks,
            "max_num_seqs": seqs,
            "max_num_batched_tokens": tokens,
            "kv_bytes_per_s": self.kv_bytes_per_s * group.num_devices,
        }

    def engines(self, placement: Placement) -> Mapping[str, dict[str, Any]]:
        """The options of the engines of a placement. Of a split, prompts have steps of as many
        sequences as answers, and answers have no prompts that would need more tokens.
        """
        seqs, tokens = placement.max_num_seqs, placement.max_num_batched_tokens
        steps = {"d": max(seqs, 2)}
        return {
            name: self.options(pool, seqs, steps.get(name, tokens))
            for name, pool in placement.engines.items()
        }

    def graph(self, placement: Placement) -> Graph:
        return graph_of(
            placement,
            self.engines(placement),
            slo_ttft_s=self.level.ttft_s,
            shares_prefixes=self.shares_prefixes,
        )

    def prices(self, placement: Placement) -> dict[str, float]:
        """The price of a replica's hour, by engine: in money, or in seconds of a device."""
        of_one = _SECONDS_OF_HOUR if self.price is None else self.price
        return {name: of_one * pool.group.num_devices for name, pool in placement.engines.items()}

    def point(
        self, placement: Placement, workload: Sequence[PlannedRequest], seed: int = 0
    ) -> SweepPoint:
        """The simulation of a placement with some of the requests."""
        simulation = SimulationPoint(self.graph(placement).document, workload, seed=seed)
        prices = self.prices(placement)
        return SweepPoint({}, simulation, self.level.objective, prices)

    def cost(self, pool: Pool, seqs: int, tokens: int) -> CostModel:
        """The cost model of an engine. Raises EngineOptionError."""
        options = self.options(pool, seqs, tokens)
        del options["kind"]
        return ModelledOptions(**options).cost

    def fit(self, group: Parallelism) -> MemoryFit:
        """The memory of a group of devices beside the weights of the model."""
        facts, budget = self.facts, self.memory_bytes * self.memory_utilization
        weights, token_bytes = self._weights(group), self._token_bytes(group)
        num_tokens = int(max(0.0, budget - weights) / token_bytes)
        num_blocks = num_tokens // self.block_size * group.expert
        misfit = group.misfit(facts)
        if not misfit and not self.is_roofline and group.num_devices > 1:
            misfit = f"profile {self.profile.name} is of one device as it was measured"
        needed = self.max_model_len + self.block_size
        if not misfit and weights > budget:
            misfit = f"weights take {_gb(weights)} of {_gb(budget)} a device"
        elif not misfit and num_tokens < needed:
            misfit = (
                f"weights take {_gb(weights)} of {_gb(budget)} a device: the rest holds "
                f"{num_tokens} tokens of KV, and one request needs {needed}"
            )
        return MemoryFit(budget, weights, num_tokens, num_blocks, misfit)

    @cached_property
    def _sized(self) -> ModelledOptions:
        dtype = "bfloat16" if self.facts.dtype == "float16" else None
        return ModelledOptions(model=self.model, dtype=dtype, block_size=self.block_size)

    def _weights(self, group: Parallelism) -> float:
        """Bytes of weights on the device of a group with the most. A stage has the layers of the
        others, rounded up, and one of the two tables; without stages, a device has both.
        """
        facts, total = self.facts, float(weight_bytes(self._sized, self.facts))
        num_tables = 1 if facts.tie_embeddings else 2
        layer_parameters = facts.num_parameters - num_tables * facts.vocab_size * facts.hidden_size
        itemsize = 4 if (facts.dtype if self._sized.dtype is None else "") == "float32" else 2
        table = float(facts.vocab_size * facts.hidden_size * itemsize)
        layers = total - num_tables * table
        of_experts = facts.experts.num_parameters if facts.experts else 0
        experts = layers * of_experts / layer_parameters
        share = -(-facts.num_layers // group.pipeline) / facts.num_layers
        each = (layers - experts) / group.tensor + experts / (group.tensor * group.expert)
        tables = table * (num_tables if group.pipeline == 1 else 1) / group.tensor
        return share * each + tables

    def _token_bytes(self, group: Parallelism) -> float:
        """Bytes of keys and values of one token, on the device of a group with the most layers."""
        facts = self.facts
        token_bytes = kv_blocks(self._sized, facts).block_bytes / self.block_size
        share = -(-facts.num_layers // group.pipeline) / facts.num_layers
        return token_bytes * share / group.num_kv_parts(facts.num_kv_heads)


def check_lengths(task: PlanTask, longest: int | None) -> None:
    """Raise PlanError for requests that no placement serves. `longest`: the limit of the model."""
    if longest is not None and task.max_model_len > longest:
        cause = f"{task.model} has a context of {longest} tokens, and the trace has requests"
        fix = "clip them with --max-input-len and --max-output-len"
        raise PlanError(f"{cause} of up to {task.max_model_len}", fix)
    blocks = task.block_size
    if task.shares_prefixes and BLOCK_LEN % blocks:
        raise AssertionError(f"blocks of {blocks} tokens do not divide those of the trace")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
