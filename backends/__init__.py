"""Floor 1, devices and kernels: what runs a lowered kernel graph."""

from sagellm.backends.protocol import Backend, LoweringError, Program
from sagellm.backends.registry import UnknownBackend, get_backend, list_available_backends
from sagellm.backends.step import KVLayout, StepInputs

__all__ = [
    "Backend",
    "KVLayout",
    "LoweringError",
    "Program",
    "StepInputs",
    "UnknownBackend",
    "get_backend",
    "list_available_backends",
]
