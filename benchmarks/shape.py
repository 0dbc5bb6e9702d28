"""The shape of Qwen2.5-0.5B, and what a token costs at least."""

VOCAB_SIZE = 151936
HIDDEN = 896
INTERMEDIATE = 4864
KV_WIDTH = 128
NUM_LAYERS = 24

# The linears of every layer, and the output layer, which reads the tied embedding.
_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * INTERMEDIATE
_OUTPUT = VOCAB_SIZE * HIDDEN
BYTES_A_TOKEN = 2 * (NUM_LAYERS * _LAYER + _OUTPUT)  # of bfloat16 weights, read once a step


def prefill_flops(prompt_len: int) -> float:
    """Floating-point operations until the first token; logits are needed of one row only."""
    linears = 2.0 * NUM_LAYERS * _LAYER * prompt_len + 2.0 * _OUTPUT
    attention = 2.0 * NUM_LAYERS * HIDDEN * prompt_len**2  # two products over the causal half
    return linears + attention
