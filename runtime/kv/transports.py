"""The registry of transports: what `kv: NAME` of executor `processes` means.

Option checks derive from this table, and a test compares documents with it. To add a transport, add
a file beside this file and an entry to the table. A user registers a transport, or an installed
package offers it by an entry point of the group `sagellm.transports`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sagellm.runtime.kv.transport import HostMemory, Sharing, Transport
from sagellm.runtime.registry import Registry

if TYPE_CHECKING:  # numpy, which a command that only checks a graph does not load
    from sagellm.runtime.kv.memory import PoolBytes


@dataclass(frozen=True, slots=True)
class Requirement:
    """A module that a transport needs: its product's name, and the command that installs it."""

    module: str
    product: str
    fix: str

    @property
    def is_met(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # the package of a dotted module
            return False


@dataclass(frozen=True, slots=True)
class TransportKind:
    """One transport.

    `open(pool, host)` opens one worker's end, and may listen on `host`; it raises OSError.
    `allocate(num_bytes)` makes the memory that the pool must lie in, `PoolBytes.memory`; None: the
    pool may lie anywhere. Raises TypeError for parts that cannot be called.
    """

    open: "Callable[[PoolBytes, str], Transport]"
    allocate: Callable[[int], HostMemory] | None = None
    requires: Requirement | None = None

    def __post_init__(self) -> None:
        for name, part in (("open", self.open), ("allocate", self.allocate)):
            if part is not None and not callable(part):
                raise TypeError(f"{name} must be a function, not {type(part).__name__}")


def read_transport(name: str, found: Any) -> TransportKind:
    """The kind of an entry point: a TransportKind, or a module with TRANSPORT. Raises TypeError."""
    kind = getattr(found, "TRANSPORT", found)
    if not isinstance(kind, TransportKind):
        raise TypeError(f"{name!r} must be a TransportKind, or a module with TRANSPORT")
    return kind


def _file(name: str) -> Any:
    """A file of this folder. It is imported when its transport is opened: NIXL is an extra, and has
    hundreds of megabytes.
    """
    return importlib.import_module(f"sagellm.runtime.kv.{name}")


TRANSPORTS: Registry[TransportKind] = Registry(
    "transport",
    "sagellm.transports",
    {
        "memory": TransportKind(
            lambda pool, host: _file("memory").SharedTransport(pool, pool.memory),
            allocate=lambda num_bytes: _file("memory").SharedMemory(num_bytes),
        ),
        "tcp": TransportKind(lambda pool, host: _file("tcp").TcpTransport(pool, host)),
        "nixl": TransportKind(
            lambda pool, host: _file("nixl").NixlTransport(pool),
            requires=Requirement("nixl_cu12", "NIXL", "pip install 'sagellm[nixl]'"),
        ),
    },
    read_transport,
)


def pool_memory(sharing: Sharing | None, num_bytes: int) -> HostMemory | None:
    """The memory that a pool must lie in to be shared so; None: it may lie anywhere.

    Raises OSError, ValueError for an unknown transport.
    """
    allocate = TRANSPORTS.find(sharing.kind).allocate if sharing is not None else None
    return allocate(num_bytes) if allocate is not None else None


def open_transport(sharing: Sharing, pool: "PoolBytes") -> Transport:
    """Open one worker's end. Raises OSError, ValueError for an unknown transport."""
    return TRANSPORTS.find(sharing.kind).open(pool, sharing.host)
