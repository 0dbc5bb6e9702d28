"""The cost of a step from the peak figures of a device and the sizes of a model."""

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from sagellm.graphs.kernels.memory_layout import ITEM_BYTES
from sagellm.graphs.models import ExpertFacts, ModelFacts
from sagellm.runtime.engine.costs.parallel import ALONE, Exchange, Parallelism, num_passes
from sagellm.runtime.engine.step_cost import StepShape


class RooflineForm(msgspec.Struct, frozen=True, tag_field="form", tag="roofline"):
    """A device: published peaks, and the parts of them that programs reach.

    `peak_flops`: of bfloat16 matrix products, dense. `bytes_per_s`: of its memory. `memory_bytes`:
    its size. `link_bytes_per_s`: to other devices of a group, in one direction.
    `flops_efficiency`: of linear layers. `attention_efficiency`: of prefill attention, also of
    `peak_flops`. `memory_efficiency`: of `bytes_per_s`. `step_s`: the fixed time of a step.
    `layer_s`: the fixed time of a layer. `all_reduce_s`: the latency of an all-reduce, and of
    other exchanges.
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
    """The sizes of a model that a roofline needs. `layer_weights`: of the linears of all layers,
    without experts. `logits_weights`: of the output layer. `weight_bytes`, `kv_bytes`: of one
    weight, and of the keys and values of one token in all layers. `item_bytes`: of one activation.
    `experts`: of a mixture.
    """

    num_layers: int
    hidden_size: int
    query_width: int
    layer_weights: float
    logits_weights: float
    weight_bytes: float
    kv_bytes: float
    item_bytes: int
    num_kv_heads: int
    experts: ExpertFacts | None = None

    @classmethod
    def of(cls, facts: ModelFacts, *, dtype: str, kv_bytes: float) -> "RooflineModel":
        """The sizes of a model in `dtype`, whose keys and values of a token take `kv_bytes`."""
        table = facts.vocab_size * facts.hidden_size
        num_tables = 1 if facts.tie_embeddings else 2
        num_expert_weights = facts.experts.num_parameters if facts.experts else 0
        item_bytes = ITEM_BYTES[dtype]
        return cls(
            facts.num_layers,
            facts.hidden_size,
            facts.num_heads * facts.head_dim,
            max(0, facts.num_parameters - num_tables * table - num_expert_weights),
            table,
            facts.weight_bits / 8 if facts.weight_bits else item_bytes,
            kv_bytes,
            item_bytes,
            facts.num_kv_heads,
            facts.experts,
        )


class StepTerms(NamedTuple):
    """The parts of the time of a step, in seconds.

    `compute_s`: arithmetic, where it takes longer than memory. `weights_s`: reading weights, where
    that takes longer. `kv_s`: reading keys and values. `exchange_s`: between the devices of a
    group. `fixed_s`: of steps and layers. `bubble_s`: stages of a pipeline that wait.
    """

    compute_s: float
    weights_s: float
    kv_s: float
    exchange_s: float
    fixed_s: float
    bubble_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RooflineCost:
    """Implements CostModel for the devices of one replica.

    Linear layers take the longer of arithmetic and reading weights. Prefill attention takes the
    longer of arithmetic and reading the context. Attention of decodes reads their contexts.
    Experts are read if any token of a micro-batch takes them; tokens take experts evenly.

    A pipeline has as many micro-batches as stages, or fewer if a step has fewer tokens; stages are
    equally long. Devices of an expert group have equal parts of the sequences.
    """

    device: RooflineForm
    model: RooflineModel
    group: Parallelism = ALONE

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        return sum(self.terms(shape))

    def terms(self, shape: StepShape) -> StepTerms:
        """The parts of the duration of a step."""
        stages, num_batches = self.group.pipeline, self._num_micro_batches(shape)
        layers_s = self.model.num_layers * self.device.layer_s
        compute_s, weights_s, kv_s, exchange_s = self._layers(shape, num_batches)
        send_s = bubble_s = 0.0
        if stages > 1:
            num_items = shape.num_tokens / num_batches * self.model.hidden_size
            send_s = self._exchange.send_s(num_items * self.model.item_bytes)
            num_times = num_passes(stages, num_batches, is_filling=shape.num_prefill_rows > 0)
            stage_s = (compute_s + weights_s + kv_s + exchange_s + layers_s) / stages
            bubble_s = (num_times - stages) * (stage_s + send_s)
        exchange_s += stages * send_s
        fixed_s = self.device.step_s + layers_s
        return StepTerms(compute_s, weights_s, kv_s, exchange_s, fixed_s, bubble_s)

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """See CostModel."""
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        each_s = self._context_token_s / self._num_micro_batches(first)
        return num_steps * self.seconds(first) + num_grown * each_s

    def _num_micro_batches(self, shape: StepShape) -> int:
        return max(1, min(self.group.pipeline, shape.num_tokens))

    def _layers(self, shape: StepShape, num_batches: int) -> tuple[float, float, float, float]:
        """Seconds of arithmetic, weights, keys and values, and exchange, of one micro-batch in all
        layers.
        """
        device, model = self.device, self.model
        num_tokens = shape.num_tokens / num_batches
        num_rows = shape.num_rows / num_batches
        linears = (
            self._linear(model.layer_weights, num_tokens, model.weight_bytes),
            self._linear(model.logits_weights, num_rows, model.item_bytes),
            self._experts(num_tokens),
        )
        pair_flops = 4.0 * model.num_layers * model.query_width * shape.num_prefill_pairs
        num_parts = self.group.tensor * self.group.expert * num_batches
        attention_s = pair_flops / (device.peak_flops * device.attention_efficiency * num_parts)
        context_token_s = self._context_token_s / num_batches
        context_s = shape.num_prefill_context_tokens * context_token_s
        compute_s = sum(flops_s for flops_s, bytes_s in linears if flops_s >= bytes_s)
        weights_s = sum(bytes_s for flops_s, bytes_s in linears if flops_s < bytes_s)
        kv_s = shape.num_decode_context_tokens * context_token_s
        if attention_s >= context_s:
            compute_s += attention_s
        else:
            kv_s += context_s
        return compute_s, weights_s, kv_s, self._exchange_s(num_tokens)

    @property
    def _context_token_s(self) -> float:
        device, group = self.device, self.group
        num_parts = group.num_kv_parts(self.model.num_kv_heads) * group.expert
        return self.model.kv_bytes / (device.bytes_per_s * device.memory_efficiency * num_parts)

    def _linear(
        self, num_weights: float, num_rows: float, weight_bytes: float
    ) -> tuple[float, float]:
        """Seconds of arithmetic and of reading weights. Every part of the sequences reads them."""
        device, group = self.device, self.group
        if not num_rows:
            return 0.0, 0.0
        flops_s = device.peak_flops * device.flops_efficiency * group.tensor
        bytes_s = device.bytes_per_s * device.memory_efficiency * group.tensor
        num_flops = 2.0 * num_weights * num_rows / group.expert
        return num_flops / flops_s, num_weights * weight_bytes / bytes_s

    def _experts(self, num_tokens: float) -> tuple[float, float]:
        """The same of experts: each of `num_experts` is missed by a token with the chance
        1 - num_chosen / num_experts.
        """
        experts, device = self.model.experts, self.device
        if experts is None or not num_tokens:
            return 0.0, 0.0
        num_devices = self.group.tensor * self.group.expert
        share = experts.num_chosen / experts.num_experts
        num_flops = 2.0 * experts.num_parameters * share * num_tokens
        num_read = experts.num_parameters * (1 - (1 - share) ** num_tokens)
        flops_s = device.peak_flops * device.flops_efficiency * num_devices
        bytes_s = device.bytes_per_s * device.memory_efficiency * num_devices
        return num_flops / flops_s, num_read * self.model.weight_bytes / bytes_s

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.device.link_bytes_per_s, self.device.all_reduce_s)

    def _exchange_s(self, num_tokens: float) -> float:
        """The exchange of each layer: an all-reduce after attention and one after the feed-forward
        layer. With experts on several devices, tokens are sent there and back instead of the
        second: each to at most `num_chosen` of them.
        """
        model, group, exchange = self.model, self.group, self._exchange
        num_bytes = num_tokens / group.expert * model.hidden_size * model.item_bytes
        reduce_s = exchange.all_reduce_s(num_bytes, group.tensor)
        if group.expert == 1 or model.experts is None:
            return 2 * model.num_layers * reduce_s
        num_copies = min(model.experts.num_chosen, group.expert) / group.tensor
        each_s = exchange.all_to_all_s(num_bytes * num_copies, group.expert)
        return model.num_layers * (reduce_s + 2 * each_s)
