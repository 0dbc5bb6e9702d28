"""The cost of a step from the peak figures of a device and the sizes of a model."""

from dataclasses import dataclass

import msgspec

from sagellm.graphs.kernels.memory_layout import ITEM_BYTES
from sagellm.graphs.models import ModelFacts
from sagellm.runtime.engine.step_cost import StepShape


class RooflineForm(msgspec.Struct, frozen=True, tag_field="form", tag="roofline"):
    """A device: published peaks, and the parts of them that programs reach.

    `peak_flops`: of bfloat16 matrix products, dense. `bytes_per_s`: of its memory. `memory_bytes`:
    its size. `link_bytes_per_s`: to other devices of a group, in one direction.
    `flops_efficiency`: of linear layers. `attention_efficiency`: of prefill attention, also of
    `peak_flops`. `memory_efficiency`: of `bytes_per_s`. `step_s`: the fixed time of a step.
    `layer_s`: the fixed time of a layer. `all_reduce_s`: the latency of an all-reduce.
    """

    peak_flops: float
    bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    flops_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    step_s: float
    layer_s: float
    all_reduce_s: float


@dataclass(frozen=True, slots=True)
class RooflineModel:
    """The sizes of a dense model that a roofline needs. `layer_weights`: of the linears of all
    layers. `logits_weights`: of the output layer. `weight_bytes`, `kv_bytes`: of one weight, and of
    the keys and values of one token in all layers. `item_bytes`: of one activation.
    """

    num_layers: int
    hidden_size: int
    query_width: int
    layer_weights: float
    logits_weights: float
    weight_bytes: float
    kv_bytes: float
    item_bytes: int

    @classmethod
    def of(cls, facts: ModelFacts, *, dtype: str, kv_bytes: float) -> "RooflineModel":
        """The sizes of a model in `dtype`, whose keys and values of a token take `kv_bytes`."""
        table = facts.vocab_size * facts.hidden_size
        num_tables = 1 if facts.tie_embeddings else 2
        item_bytes = ITEM_BYTES[dtype]
        return cls(
            facts.num_layers,
            facts.hidden_size,
            facts.num_heads * facts.head_dim,
            max(0, facts.num_parameters - num_tables * table),
            table,
            facts.weight_bits / 8 if facts.weight_bits else item_bytes,
            kv_bytes,
            item_bytes,
        )


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """Implements CostModel for one device, or for a group of `num_devices` that split each layer.

    Linear layers take the longer of arithmetic and reading weights. Prefill attention takes the
    longer of arithmetic and reading the context. Attention of decodes reads their contexts.
    """

    device: RooflineForm
    model: RooflineModel
    num_devices: int = 1

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        device, model = self.device, self.model
        fixed = device.step_s + model.num_layers * device.layer_s
        layers = self._linear(model.layer_weights, shape.num_tokens, model.weight_bytes)
        logits = self._linear(model.logits_weights, shape.num_rows, model.item_bytes)
        pair_flops = 4.0 * model.num_layers * model.query_width * shape.num_prefill_pairs
        prefill = max(
            pair_flops / self._speed(device.peak_flops * device.attention_efficiency),
            shape.num_prefill_context_tokens * self._context_token_s,
        )
        decodes = shape.num_decode_context_tokens * self._context_token_s
        return fixed + layers + logits + prefill + decodes + self._all_reduces(shape.num_tokens)

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        return num_steps * self.seconds(first) + num_grown * self._context_token_s

    @property
    def _context_token_s(self) -> float:
        device = self.device
        return self.model.kv_bytes / self._speed(device.bytes_per_s * device.memory_efficiency)

    def _speed(self, of_one: float) -> float:
        return of_one * self.num_devices

    def _linear(self, num_weights: float, num_rows: int, weight_bytes: float) -> float:
        device = self.device
        if not num_rows:
            return 0.0
        flops_s = self._speed(device.peak_flops * device.flops_efficiency)
        bytes_s = self._speed(device.bytes_per_s * device.memory_efficiency)
        return max(2.0 * num_weights * num_rows / flops_s, num_weights * weight_bytes / bytes_s)

    def _all_reduces(self, num_tokens: int) -> float:
        """Two for each layer, as a ring: each device sends its part twice."""
        if self.num_devices == 1:
            return 0.0
        num_bytes = num_tokens * self.model.hidden_size * self.model.item_bytes
        share = 2 * (self.num_devices - 1) / self.num_devices
        each = self.device.all_reduce_s + num_bytes * share / self.device.link_bytes_per_s
        return 2 * self.model.num_layers * each
