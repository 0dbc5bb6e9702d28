"""Torch's tensors as the arrays that a backend takes."""

from collections.abc import Mapping

import torch

from sagellm.backends.cpu.torch_linear import array


def arrays(weights: Mapping[str, object]) -> dict[str, object]:
    """The weights with arrays in the place of tensors."""
    return {
        name: array(weight.detach()) if isinstance(weight, torch.Tensor) else weight
        for name, weight in weights.items()
    }
