"""Groups of devices that serve one replica: how they share a model, and what they exchange."""

from collections.abc import Iterator
from dataclasses import dataclass

from sagellm.graphs.models import ModelFacts


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How the devices of one replica share its model.

    `tensor`: devices that split each layer. `pipeline`: stages of consecutive layers. `expert`:
    devices, or groups of `tensor` devices, that each compute the attention of a part of the
    sequences, and hold a part of the experts.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def num_devices(self) -> int:
        return self.tensor * self.pipeline * self.expert

    @property
    def name(self) -> str:
        """A name such as "TP2 x PP4"."""
        named = (("TP", self.tensor), ("PP", self.pipeline), ("EP", self.expert))
        return " x ".join(f"{kind}{number}" for kind, number in named if number > 1) or "TP1"

    def num_kv_parts(self, num_kv_heads: int) -> int:
        """The parts of a layer's keys and values: more devices than heads keep copies."""
        return min(self.tensor, num_kv_heads)

    def misfit(self, facts: ModelFacts) -> str:
        """Why a model cannot be shared in this way; empty if it can."""
        return next(self._misfits(facts), "")

    def _misfits(self, facts: ModelFacts) -> Iterator[str]:
        heads, kv_heads, tensor = facts.num_heads, facts.num_kv_heads, self.tensor
        if heads % tensor:
            yield f"TP{tensor} does not divide {heads} attention heads"
        if kv_heads % tensor and tensor % kv_heads:
            yield f"TP{tensor} divides no {kv_heads} KV heads, nor is it a multiple of them"
        if self.pipeline > facts.num_layers:
            yield f"PP{self.pipeline} needs more than {facts.num_layers} layers"
        if self.expert > 1 and facts.experts is None:
            yield f"EP{self.expert} needs a mixture of experts, and the model is dense"
        elif facts.experts is not None and facts.experts.num_experts % self.expert:
            yield f"EP{self.expert} does not divide {facts.experts.num_experts} experts"


ALONE = Parallelism()


@dataclass(frozen=True, slots=True)
class Exchange:
    """The links of a device: `bytes_per_s` in one direction, and the latency of an exchange."""

    bytes_per_s: float
    latency_s: float

    def all_reduce_s(self, num_bytes: float, num_devices: int) -> float:
        """The sum of a tensor of `num_bytes` on every device, as a ring: each device sends
        2 (n - 1) / n of the tensor. Source: Patarasuk and Yuan, 2009.
        """
        if num_devices == 1:
            return 0.0
        share = 2 * (num_devices - 1) / num_devices
        return self.latency_s + num_bytes * share / self.bytes_per_s

    def all_to_all_s(self, num_bytes: float, num_devices: int) -> float:
        """Each device sends `num_bytes` in equal parts to all devices, itself included."""
        if num_devices == 1:
            return 0.0
        share = (num_devices - 1) / num_devices
        return self.latency_s + num_bytes * share / self.bytes_per_s

    def send_s(self, num_bytes: float) -> float:
        """One device sends a tensor to the next stage of a pipeline."""
        return self.latency_s + num_bytes / self.bytes_per_s


def num_passes(num_stages: int, num_micro_batches: int, *, is_filling: bool) -> int:
    """The times of one stage that a step takes.

    A pipeline that has to be filled first takes stages - 1 more than it has micro-batches; these
    are its bubble. Source: GPipe, 2019. Steps that only decode follow each other without it.
    """
    more = num_stages - 1 if is_filling else 0
    return max(num_stages, num_micro_batches + more)
