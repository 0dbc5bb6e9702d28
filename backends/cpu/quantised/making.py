"""From a weight in floats to one in 8 or 4 bits: the scale of least error for each group."""

import torch
from torch.nn.functional import pad

from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.quantised import GROUP, ZERO, QuantisedWeight

_ROWS = 1 << 18  # numbers at a time, so that what a try makes stays in the cache

# Which code the largest number of a group may get. 4 bits have one code more below 0 than above,
# and giving up a little of the largest number makes the others better.
TRIES = {
    4: tuple(code for size in (6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5) for code in (-size, size)),
    8: tuple(127.0 + 0.25 * step for step in range(-8, 9)),
}
_LARGEST = 65504.0  # of float16
_LIMITS = {4: (-8, 7), 8: (-127, 127)}


def quantised(
    weight: torch.Tensor, bits: int, kernels: NativeKernels | None = None
) -> QuantisedWeight:
    """`weight` [N, K], float32 or bfloat16, in groups of 32: without zeros, scales in float16."""
    if kernels:
        return QuantisedWeight(
            bits, GROUP, *kernels.quantise(weight.contiguous(), bits, TRIES[bits])
        )
    parts = [_quantised(part.float(), bits) for part in torch.split(weight, _num_rows(weight))]
    codes, scales = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
    return QuantisedWeight(bits, GROUP, codes, scales)


def _num_rows(weight: torch.Tensor) -> int:
    return max(1, _ROWS // weight.shape[1])


def _quantised(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = pad(weight, (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    scales = _best_scales(groups, bits).half()
    codes = _codes(groups, scales.float(), bits) + ZERO[bits]
    dtype = torch.uint8 if bits == 4 else torch.int8
    return codes.to(dtype).flatten(1)[:, : weight.shape[1]], scales.squeeze(-1)


def _best_scales(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """[N, G, 1]: of all tries, and of the least-squares fit to the best one's codes."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = _stored(largest / TRIES[bits][0])
    error = _error(groups, best, bits)
    for code in TRIES[bits][1:]:
        best, error = _better(groups, _stored(largest / code), best, error, bits)
    codes = _codes(groups, best, bits)
    fit = (groups * codes).sum(-1, True) / (codes.square().sum(-1, True) + 1e-30)
    return _better(groups, _stored(fit), best, error, bits)[0]


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """The nearest scales that float16 has: codes are chosen for those."""
    return scales.clamp(-_LARGEST, _LARGEST).half().float()


def _better(
    groups: torch.Tensor, scales: torch.Tensor, best: torch.Tensor, error: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _error(groups, scales, bits)
    is_less = found < error
    return torch.where(is_less, scales, best), torch.where(is_less, found, error)


def _error(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    return (_codes(groups, scales, bits) * scales - groups).square().sum(-1, True)


def _codes(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    inverse = torch.where(scales.abs() > 1e-30, 1 / scales, 0.0)
    return (groups * inverse).round().clamp(*_LIMITS[bits])
