"""The parts of the steps of a simulation: seconds of each kind, by engine."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import Graph
from sagellm.opening.graph_engines import engine_options
from sagellm.runtime.engine.costs.roofline import RooflineCost, StepTerms
from sagellm.runtime.engine.kinds.modelled import ModelledOptions
from sagellm.runtime.engine.step_cost import StepShape
from sagellm.runtime.messages import EngineReplica


@dataclass(slots=True)
class EngineSteps:
    """The steps of all replicas of one engine, in seconds and numbers.

    `terms`: of a roofline; None: the cost model has no terms. `full_s`: of steps with as many
    sequences as `max_num_seqs`. `mixed_s`, `num_mixed`: of steps that compute prompts beside
    answers. `decode_s`, `num_decodes`: of steps that compute answers alone. `prefill_s`: of steps
    that compute prompts alone.
    """

    options: ModelledOptions
    cost: RooflineCost | None
    terms: list[float] | None
    busy_s: float = 0.0
    full_s: float = 0.0
    mixed_s: float = 0.0
    num_mixed: int = 0
    decode_s: float = 0.0
    num_decodes: int = 0
    prefill_s: float = 0.0

    def add(self, shape: StepShape, num_steps: int, seconds: float) -> None:
        """Count consecutive steps; `shape` is that of the first."""
        self.busy_s += seconds
        if shape.num_rows >= self.options.max_num_seqs:
            self.full_s += seconds
        if shape.num_prefill_rows and shape.num_decode_rows:
            self.mixed_s += seconds
            self.num_mixed += num_steps
        elif shape.num_prefill_rows:
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
            self.num_decodes += num_steps
        if self.cost is not None and self.terms is not None:
            terms = self.cost.terms(shape)
            for number, each_s in enumerate(terms):
                self.terms[number] += each_s * num_steps
            # The contexts of later steps are longer: reading them is what the run took more.
            self.terms[_KV] += seconds - num_steps * sum(terms)

    def share(self, *names: str) -> float | None:
        """The share of the busy time in these terms; None: the cost model has no terms."""
        if self.terms is None:
            return None
        seconds = sum(self.terms[StepTerms._fields.index(name)] for name in names)
        return seconds / self.busy_s if self.busy_s else 0.0


_KV = StepTerms._fields.index("kv_s")


class StepUse:
    """Counts the steps of each engine of a graph; pass it as `on_run` of a simulation."""

    def __init__(self, graph: Graph) -> None:
        self.engines: Mapping[str, EngineSteps] = {
            name: _engine_steps(engine_options(graph, name)) for name in graph.engines
        }

    def __call__(
        self, place: EngineReplica, shape: StepShape, num_steps: int, seconds: float
    ) -> None:
        self.engines[place.engine].add(shape, num_steps, seconds)


def _engine_steps(options: ModelledOptions) -> EngineSteps:
    cost = options.cost
    if isinstance(cost, RooflineCost):
        return EngineSteps(options, cost, [0.0] * len(StepTerms._fields))
    return EngineSteps(options, None, None)
