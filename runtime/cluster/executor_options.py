"""The options of each executor, as `executor:` of a graph file gives them."""

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.prefixes import MAX_PREFIX_BLOCKS
from sagellm.runtime.registry import read_options

IPC = "ipc"  # as an address: a socket file that only this user reaches
_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[^:/\[\]*]+):(\d{1,5})")
_EVERYWHERE = ("0.0.0.0", "[::]")


class OptionConflict(NamedTuple):
    """Options that do not go together: the one to change, why, and how."""

    option: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class TasksOptions:
    """`max_prefix_blocks`: prefix blocks of engines that are known to routers, at most."""

    max_prefix_blocks: int = field(default=MAX_PREFIX_BLOCKS, metadata={"min": 0})


@dataclass(frozen=True, slots=True)
class ProcessesOptions:
    """How the workers of executor `processes` are linked and watched; times are in seconds.

    Each is asked every `ping_s` for a sign of life, and counts as dead `silent_s` after its last,
    at least twice `ping_s`; or once its engine has been hung for `hang_s`. `max_hold_s`: how long a
    request waits for an engine of which no replica is there.

    `num_spares`: processes that have imported what a worker needs, and take the place of one that
    dies; none where no engine computes.

    `address` is that of the graph's end: `ipc`, or `tcp://HOST:PORT` (port 0: any that is free),
    which takes the `keys` of a folder. `kv`: what KV blocks go through between workers.
    `max_prefix_blocks`: prefix blocks of engines that are known to routers, at most.
    """

    ping_s: float = field(default=0.25, metadata={"min": 1e-3})
    silent_s: float = field(default=1.0, metadata={"min": 1e-3})
    hang_s: float = field(default=30.0, metadata={"min": 1e-3})
    max_hold_s: float = field(default=30.0, metadata={"min": 0.0})
    num_spares: int = field(default=1, metadata={"min": 0})
    address: str = IPC
    keys: str | None = None
    kv: Literal["memory", "tcp", "nixl"] = "memory"
    max_prefix_blocks: int = field(default=MAX_PREFIX_BLOCKS, metadata={"min": 0})

    @property
    def host(self) -> str:
        """Of the address, where KV is listened for, too."""
        found = _TCP.fullmatch(self.address)
        return found[1].strip("[]") if found else "127.0.0.1"

    def mistakes(self) -> Iterator[OptionConflict]:
        """What each option by itself does not show."""
        if not hasattr(os, "pidfd_open"):
            yield OptionConflict(
                "kind",
                "worker processes need Linux: they are watched and share memory by its means",
                "use executor tasks, which runs the whole graph in one process",
            )
        if self.silent_s < 2 * self.ping_s:
            yield OptionConflict(
                "silent_s",
                f"{self.silent_s:g} is less than two pings of {self.ping_s:g} s",
                "raise silent_s, or lower ping_s: every worker would be taken for dead",
            )
        if self.kv == "nixl" and importlib.util.find_spec("nixl_cu12") is None:
            yield OptionConflict("kv", "NIXL is not installed", "pip install 'sagellm[nixl]'")
        if self.address == IPC:
            return
        found = _TCP.fullmatch(self.address)
        if found is None or int(found[2]) > 65535 or found[1] in _EVERYWHERE:
            yield OptionConflict(
                "address",
                f"{self.address!r} is neither ipc nor an address that workers can connect to",
                "write tcp://HOST:PORT with one host of this machine, such as tcp://127.0.0.1:0",
            )
        elif self.keys is None:
            yield OptionConflict(
                "address",
                "links over tcp need keys: else anybody could be a worker",
                "run `sagellm keys FOLDER`, and set executor.keys to that folder",
            )


EXECUTORS = {"tasks": TasksOptions, "processes": ProcessesOptions}


def processes_options(graph: Graph) -> ProcessesOptions | None:
    """Those of executor `processes`, None where it is not asked for. Raises OptionError."""
    executor = graph.attrs.get("executor")
    options = dict(executor) if isinstance(executor, FrozenMap) else {}
    if options.pop("kind", "tasks") == "tasks":
        return None
    return read_options(ProcessesOptions, options)
