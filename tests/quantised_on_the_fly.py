"""GPTQ and AWQ folders made from random models: packed as AutoGPTQ and AutoAWQ publish it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column comes at each place of a word, lowest first


@dataclass(frozen=True)
class Form:
    """How a folder is quantised. `group` -1: one group a row."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    is_symmetric: bool = False
    reorders: bool = False
    version: str = "gptq"

    @property
    def config(self) -> dict[str, object]:
        if self.method == "awq":
            words = {"version": "gemm", "zero_point": True}
        else:
            words = {"sym": self.is_symmetric, "desc_act": self.reorders}
            words["checkpoint_format"] = self.version
        return {
            **{"quant_method": self.method, "bits": self.bits, "group_size": self.group},
            **words,
        }


def quantise_folder(source: Path, target: Path, form: Form) -> tuple[Path, Path]:
    """Write `target`/stored, quantised, and `target`/floats with what it stands for, in float32."""
    weights = load_file(source / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for index, (name, weight) in enumerate(weights.items()):
        if weight.dim() == 2 and name.startswith("model.layers"):
            parts, floats[name] = quantise(weight.float(), form, seed=index)
            stored |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
        else:
            stored[name] = floats[name] = weight
    config = json.loads((source / "config.json").read_text())
    quantised = {**config, "quantization_config": form.config}
    for name, tensors, settings in (("stored", stored, quantised), ("floats", floats, config)):
        folder = target / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (folder / file).write_bytes((source / file).read_bytes())
    return target / "stored", target / "floats"


def quantise(
    weight: torch.Tensor, form: Form, seed: int = 0
) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    """Tensors of one linear by their suffix, and the float32 weight [N, K] they stand for."""
    num_rows, size = weight.shape
    group = size if form.group == -1 else form.group
    of_group = torch.arange(size) // group
    if form.reorders:
        of_group = of_group[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    top = 2**form.bits - 1
    scales, zeros = (
        torch.empty(-(-size // group), num_rows),
        torch.empty(-(-size // group), num_rows),
    )
    for index in range(len(scales)):
        part = weight[:, of_group == index]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if form.is_symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[index] = ((high - low) / top).half().float()
        zeros[index] = (-low / scales[index]).round().clamp(0, top)
        if form.is_symmetric:
            zeros[index] = (top + 1) // 2
    each_scale, each_zero = scales[of_group], zeros[of_group]  # [K, N]
    codes = (weight.T / each_scale + each_zero).round().clamp(0, top)
    floats = ((codes - each_zero) * each_scale).T.contiguous()
    parts = {"scales": scales.half()}
    if form.method == "awq":
        parts["qweight"] = packed(interleaved(codes.int()), 4)
        parts["qzeros"] = packed(interleaved(zeros.int()), 4)
        return parts, floats
    told = zeros.int() - 1 if form.version == "gptq" else zeros.int()
    parts["qweight"] = packed(codes.int().T, form.bits).T.contiguous()
    parts["qzeros"] = packed(told & top, form.bits)
    parts["g_idx"] = of_group.int()
    return parts, floats


def interleaved(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> [R, C * bits / 32] int32, the first in the lowest bits."""
    words = codes.long().view(len(codes), -1, 32 // bits)
    total = sum(words[:, :, place] << (bits * place) for place in range(32 // bits))
    signed = torch.where(total >= 2**31, total - 2**32, total)
    return signed.int().contiguous()
