"""Floor 1, devices and kernels: what runs a lowered kernel graph."""

from sagellm.backends.kv_storage import KVStorage
from sagellm.backends.protocol import Backend, Device, LaunchError, LoweringError, Program, Queue
from sagellm.backends.registry import UnknownBackend, get_backend, list_available_backends
from sagellm.backends.row import Row
from sagellm.backends.sampled import Logprob, Sampled
from sagellm.backends.step import KVLayout, Scored, StepBatch, StepInputs, Ticket

__all__ = [
    "Backend",
    "Device",
    "KVLayout",
    "KVStorage",
    "LaunchError",
    "Logprob",
    "LoweringError",
    "Program",
    "Queue",
    "Row",
    "Sampled",
    "Scored",
    "StepBatch",
    "StepInputs",
    "Ticket",
    "UnknownBackend",
    "get_backend",
    "list_available_backends",
]
