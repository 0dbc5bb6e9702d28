"""The CPU backend: torch code defines every kernel, and C code replaces most of them for speed."""

from sagellm.backends.cpu.device import CpuBackend

BACKEND = CpuBackend()

__all__ = ["BACKEND", "CpuBackend"]
