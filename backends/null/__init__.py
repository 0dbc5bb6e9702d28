"""The backend that computes nothing: every rule of scheduling and memory, without a model."""

from sagellm.backends.null.backend import NullBackend

BACKEND = NullBackend()

__all__ = ["BACKEND", "NullBackend"]
