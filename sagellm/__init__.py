"""sagellm: serve large language models as a dataflow."""

import gc
import importlib
from typing import Any

__version__ = "0.1.0"

# A name loads its module at first use, so that `import sagellm.graphs` loads only `graphs`.
_NAMES = {
    "Graph": "sagellm.builder",
    "Sampling": "sagellm.runtime.messages",
    "Request": "sagellm.runtime.messages",
    "TokenEvent": "sagellm.runtime.messages",
    "Answer": "sagellm.runtime.messages",
    "RequestError": "sagellm.session.requests",
    "UsageError": "sagellm.errors",
    "RequestRefused": "sagellm.session.requests",
    "RequestFailed": "sagellm.session.requests",
    "function": "sagellm.extensions",
    "register_backend": "sagellm.backends.interface",
    "register_chat_format": "sagellm.extensions",
    "register_engine_kind": "sagellm.extensions",
    "register_function": "sagellm.extensions",
    "register_model_family": "sagellm.graphs.models",
    "register_operator": "sagellm.extensions",
    "register_policy": "sagellm.extensions",
    "register_strategy": "sagellm.extensions",
    "register_transport": "sagellm.extensions",
    "GraphError": "sagellm.graphs.diagnostics",
    "serve": "sagellm.http_server",
    "serve_async": "sagellm.http_server",
    "UnifiedInferenceClient": "sagellm.client.unified",
    "AsyncUnifiedInferenceClient": "sagellm.client.unified_async",
    "ClientError": "sagellm.client.responses",
    "log": "sagellm.logs",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return _imported("sagellm.ops")
    if name in _NAMES:
        return getattr(_imported(_NAMES[name]), name)
    raise AttributeError(f"module 'sagellm' has no attribute {name!r}")


def _imported(module: str) -> Any:
    """Import a module without collections of garbage: imports make little, and each visits much."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if was_enabled:
            gc.enable()


def __dir__() -> list[str]:
    return [*_NAMES, "ops", "__version__"]
