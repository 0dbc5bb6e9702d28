"""The CPU backend: the living definition of every kernel, and a fast one."""

from sagellm.backends.cpu.device import CpuBackend

BACKEND = CpuBackend()

__all__ = ["BACKEND", "CpuBackend"]
