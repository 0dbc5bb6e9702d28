"""Which weights are multiplied in few bits, and what their rows become for it."""

from collections.abc import Sequence

import torch

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.linear import Linear, linear
from sagellm.backends.cpu.quantised.dequantising import dequantising
from sagellm.backends.cpu.quantised.making import quantised
from sagellm.backends.cpu.quantised.packing import Packed
from sagellm.backends.quantised import LOGITS, MODES, Mode, QuantisedWeight


def few_bits(
    binding: Binding,
    names: Sequence[str],
    sizes: Sequence[int],
    size: int,
    bias: torch.Tensor | None,
) -> Linear | None:
    """rows [T, size] -> [T, sum(sizes)] by the weights of these names, one below the other.

    None where all of them are stored in floats and stay so.
    """
    stored = [binding.stored(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
    if binding.quantization is None and not any(stored):
        return None
    named = zip(stored, names, sizes, strict=True)
    weights = [found or _on_load(binding, name, rows, size) for found, name, rows in named]
    if (joined := _joined(weights)) is not None:
        return _product(binding, joined, bias, binding.makes_logits(names[0]))
    biases = [None] * len(sizes) if bias is None else list(torch.split(bias, list(sizes)))
    parts = [_product(binding, *part, False) for part in zip(weights, biases, strict=True)]
    return lambda rows: torch.cat([part(rows) for part in parts], 1)


def _on_load(binding: Binding, name: str, rows: int, size: int) -> QuantisedWeight | torch.Tensor:
    weight = binding.weight(name, rows, size)
    if binding.quantization is None:
        return weight
    bits = (LOGITS if binding.makes_logits(name) else MODES[binding.quantization]).weight_bits
    return quantised(weight, bits, binding.native)


def _product(
    binding: Binding,
    weight: QuantisedWeight | torch.Tensor,
    bias: torch.Tensor | None,
    is_logits: bool,
) -> Linear:
    if isinstance(weight, torch.Tensor):
        return linear(binding, weight, bias, exact=is_logits)
    mode = LOGITS if is_logits else MODES.get(binding.quantization or "")
    bits = _row_bits(weight.bits, mode, binding.deterministic)
    kernels = binding.native
    if kernels is None:
        return dequantising(weight, bias, bits, alone=binding.deterministic)
    return Packed(kernels, weight, bias, bits)


def _row_bits(weight_bits: int, mode: Mode | None, deterministic: bool) -> int:
    """8 where the mode says so, or a 4-bit weight's own error hides that of such rows.

    `mode` None: of a weight that is stored quantised. `deterministic` asks for exact products.
    """
    if weight_bits == 4:
        return 16 if deterministic else 8
    return mode.row_bits if mode else 16


def _joined(weights: Sequence[QuantisedWeight | torch.Tensor]) -> QuantisedWeight | None:
    """The weights as one; None where their forms differ."""
    first, *others = weights
    if not isinstance(first, QuantisedWeight):
        return None
    if not all(isinstance(other, QuantisedWeight) and _alike(first, other) for other in others):
        return None
    alike = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in alike])  # type: ignore[misc]
    codes, scales = (torch.cat([getattr(w, name) for w in alike]) for name in ("codes", "scales"))
    return QuantisedWeight(first.bits, first.group, codes, scales, zeros, first.order)


def _alike(a: QuantisedWeight, b: QuantisedWeight) -> bool:
    if (a.bits, a.group, a.zeros is None) != (b.bits, b.group, b.zeros is None):
        return False
    if a.order is None or b.order is None:
        return a.order is b.order
    return torch.equal(a.order, b.order)
