"""The CPU backend: every kernel in torch, as its definition, and most of them in C, for speed."""

from sagellm.backends.cpu.device import CpuBackend

BACKEND = CpuBackend()

__all__ = ["BACKEND", "CpuBackend"]
