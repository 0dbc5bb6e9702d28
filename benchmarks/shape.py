"""The shapes of the measured models, and the least cost of their tokens."""

from dataclasses import dataclass

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with tied embeddings: `family` is "qwen2" (biases of Q, K and V) or "llama"."""

    name: str
    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_len: int

    @property
    def kv_width(self) -> int:
        """The number of key values of one token in one layer."""
        return self.num_kv_heads * self.hidden // self.num_heads

    @property
    def kv_bytes_a_token(self) -> int:
        """The bytes of keys and values of a token in bfloat16."""
        return 2 * BF16_BYTES * self.num_layers * self.kv_width

    @property
    def num_weights(self) -> int:
        """The weights that a decode step reads: the linears of every layer and the output layer."""
        return self.num_layers * self._layer + self._output

    @property
    def bytes_a_token(self) -> int:
        """The bytes of the bfloat16 weights that a step reads once."""
        return BF16_BYTES * self.num_weights

    @property
    def _layer(self) -> int:
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return attention + 3 * self.hidden * self.intermediate

    @property
    def _output(self) -> int:
        return self.vocab_size * self.hidden

    def prefill_flops(self, prompt_len: int) -> float:
        """Operations until the first token. Logits are computed for one row only."""
        linears = 2.0 * self.num_layers * self._layer * prompt_len + 2.0 * self._output
        # Two products over the causal half.
        attention = 2.0 * self.num_layers * self.hidden * prompt_len**2
        return linears + attention

    def decode_flops(self, context_len: int) -> float:
        """Operations of one more token of a sequence."""
        return 2.0 * self.num_weights + 4.0 * self.num_layers * self.hidden * context_len


QWEN05 = Shape("qwen05", "qwen2", 151936, 896, 4864, 24, 14, 2, 32768)
LLAMA15M = Shape("llama15m", "llama", 32000, 288, 768, 6, 6, 6, 4096)
# QWEN05 with two layers and a long context: shows the cost of attention in an affordable time.
QWEN05_2L = Shape("qwen05-2-layers", "qwen2", 151936, 896, 4864, 2, 14, 2, 40960)
# A model so small that an HTTP server costs more than the model.
ONE_LAYER = Shape("one-layer", "llama", 512, 64, 128, 1, 4, 4, 512)
