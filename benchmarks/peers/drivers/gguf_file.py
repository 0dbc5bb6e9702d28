"""Converts a model folder to a GGUF file for llama.cpp. Runs in the environment gguf.

    python gguf_file.py FOLDER FILE

Imports nothing of sagellm. Weights stay bfloat16; norms and biases become float32, which llama.cpp
requires. Word N of the vocabulary is "wN", as in the tokenizer of the folder.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
CONTROL = 3  # llama.cpp's type of tokens without a text


def main() -> None:
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, config["model_type"])
    _describe(writer, config)
    _tokens(writer, config["vocab_size"])
    for name, bits in _tensors(folder / "model.safetensors"):
        _add(writer, config, name, bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _tokens(writer: Any, num_tokens: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"w{number}" for number in range(num_tokens)])
    writer.add_token_types([CONTROL, *[1] * (num_tokens - 1)])
    writer.add_token_merges(["w 0"])  # llama.cpp requires a merge; prompts are token ids
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Name and bits (uint16, in the tensor's shape) of every tensor in a safetensors file."""
    content = np.memmap(file, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, entry in json.loads(content[8:start].tobytes()).items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}; BF16 is what can be written")
            first, last = (start + offset for offset in entry["data_offsets"])
            yield name, content[first:last].view(np.uint16).reshape(entry["shape"])


def _add(writer: Any, config: dict[str, Any], name: str, bits: Any) -> None:
    if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        bits = _interleaved(bits, config[key])
    if bits.ndim == 1:
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(_name(name), wide)
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def _interleaved(bits: Any, num_heads: int) -> Any:
    """Reorder rows for RoPE: llama.cpp rotates neighbours, transformers the halves of a head."""
    halves = bits.reshape(num_heads, 2, bits.shape[0] // num_heads // 2, *bits.shape[1:])
    return halves.swapaxes(1, 2).reshape(bits.shape)


if __name__ == "__main__":
    main()
