"""An engine kind of your own: a GPU that you do not have, with times from its data sheet."""

from dataclasses import dataclass, field

from sagellm import Graph, Sampling, ops, register_engine_kind
from sagellm.runtime.engine.kinds import EngineKind, modelled
from sagellm.runtime.engine.options import PagedOptions
from sagellm.runtime.engine.step_cost import StepCost
from sagellm.runtime.models.folder import resolve_model


@dataclass(frozen=True)
class RooflineOptions(PagedOptions):
    """The options of a KV pool and a scheduler, and the figures of an H100 SXM."""

    bytes_per_s: float = field(default=3.35e12, metadata={"min": 1})  # of HBM3
    flops: float = field(default=989e12, metadata={"min": 1})  # dense bfloat16
    kv_bytes_per_s: float = field(default=450e9, metadata={"min": 1})  # of NVLink, one direction

    quantization = None
    capabilities = modelled.KIND.capabilities

    @property
    def cost(self) -> StepCost:
        """A step reads all weights once (2 bytes each); a token costs 2 operations a weight."""
        num_weights = resolve_model(self.model).facts.num_parameters
        return StepCost(2 * num_weights / self.bytes_per_s, 2 * num_weights / self.flops)


# All but the options and the cost of a step is as for kind `modelled`.
KIND = EngineKind(
    RooflineOptions, RooflineOptions.capabilities, modelled.KIND.open, modelled.KIND.describe
)

if __name__ == "__main__":
    register_engine_kind("roofline", KIND)
    graph = Graph("g").engine("e", kind="roofline") >> ops.generate(engine="e")
    with graph.open() as session:
        answer = session.generate("one", sampling=Sampling(max_tokens=4, ignore_eos=True))
    print("tokens:", len(answer.token_ids))
