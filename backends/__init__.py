"""Floor 1, devices and kernels: backends lower kernel graphs to programs and run them."""

from sagellm.backends.interface import (
    Backend,
    Device,
    KVStorage,
    LaunchError,
    LoweringError,
    Program,
    Queue,
    UnknownBackend,
    get_backend,
    list_available_backends,
)
from sagellm.backends.step import (
    KVLayout,
    LogitsRow,
    Logprob,
    Sampled,
    Scored,
    StepBatch,
    StepInputs,
    Ticket,
)

__all__ = [
    "Backend",
    "Device",
    "KVLayout",
    "KVStorage",
    "LaunchError",
    "LogitsRow",
    "Logprob",
    "LoweringError",
    "Program",
    "Queue",
    "Sampled",
    "Scored",
    "StepBatch",
    "StepInputs",
    "Ticket",
    "UnknownBackend",
    "get_backend",
    "list_available_backends",
]
