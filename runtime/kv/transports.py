"""Every transport by its name."""

import importlib

from sagellm.runtime.kv.memory import PoolBytes, SharedMemory, SharedTransport
from sagellm.runtime.kv.tcp import TcpTransport
from sagellm.runtime.kv.transport import Sharing, Transport

_NIXL = "sagellm.runtime.kv.nixl"  # an extra, and hundreds of megabytes


def open_transport(sharing: Sharing, pool: PoolBytes, memory: SharedMemory | None) -> Transport:
    """That of one worker; `memory` is what the pool lies in, for `memory` alone. Raises OSError."""
    if sharing.kind == "tcp":
        return TcpTransport(pool, sharing.host)
    if sharing.kind == "nixl":
        transport: Transport = importlib.import_module(_NIXL).NixlTransport(pool)
        return transport
    assert memory is not None
    return SharedTransport(pool, memory)
