"""The options of each executor, as `executor:` of a graph file sets them."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.runtime.kv.transports import TRANSPORTS
from sagellm.runtime.prefixes import MAX_PREFIX_BLOCKS
from sagellm.runtime.registry import BrokenEntryPoint, read_options

IPC = "ipc"  # the address that means a socket file, which only this user can access
_TCP = re.compile(r"tcp://(\[[0-9a-fA-F:]+\]|[^:/\[\]*]+):(\d{1,5})")
_EVERYWHERE = ("0.0.0.0", "[::]")  # workers cannot connect to such an address


class OptionConflict(NamedTuple):
    """Options that conflict: the option to change, the reason, and the fix."""

    option: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class TasksOptions:
    """`max_hold_s`: the longest time that a request waits while no replica of its engine is up, in
    seconds. `max_prefix_blocks`: the most cached prefix blocks that routers keep track of.
    """

    max_hold_s: float = field(default=30.0, metadata={"min": 0.0})
    max_prefix_blocks: int = field(default=MAX_PREFIX_BLOCKS, metadata={"min": 0})


@dataclass(frozen=True, slots=True)
class ProcessesOptions:
    """How the workers of executor `processes` are linked and watched. Times are in seconds.

    The supervisor pings each worker every `ping_s`. A worker counts as dead after `silent_s`
    without a sign of life, or after its engine has hung for `hang_s`; `silent_s` must be at least
    twice `ping_s`. `max_hold_s`: the longest time that a request waits while no replica of its
    engine is up.

    `num_spares`: the number of spare processes, which have imported a worker's modules and replace
    workers that die. There are no spares if no engine of the graph computes.

    `address`: where the graph listens: `ipc`, or `tcp://HOST:PORT` (port 0: any free port). A tcp
    address needs `keys`, a folder of keys. `kv`: the name of the transport of KV blocks between
    workers. `max_prefix_blocks`: the most cached prefix blocks that routers keep track of.
    """

    ping_s: float = field(default=0.25, metadata={"min": 1e-3})
    silent_s: float = field(default=1.0, metadata={"min": 1e-3})
    hang_s: float = field(default=30.0, metadata={"min": 1e-3})
    max_hold_s: float = field(default=30.0, metadata={"min": 0.0})
    num_spares: int = field(default=1, metadata={"min": 0})
    address: str = IPC
    keys: str | None = None
    kv: str = field(default="memory", metadata={"names": "transports"})
    max_prefix_blocks: int = field(default=MAX_PREFIX_BLOCKS, metadata={"min": 0})

    @property
    def host(self) -> str:
        """The host of `address`. Transports of KV blocks listen on this host, too."""
        found = _TCP.fullmatch(self.address)
        return found[1].strip("[]") if found else "127.0.0.1"

    def mistakes(self) -> Iterator[OptionConflict]:
        """The conflicts between options, or between an option and this machine. The type and the
        range of each option have been checked before.
        """
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
        yield from self._transport_conflicts()
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

    def _transport_conflicts(self) -> Iterator[OptionConflict]:
        """The reasons why worker processes cannot open the transport `kv`."""
        if TRANSPORTS.is_registered_here(self.kv):
            yield OptionConflict(
                "kv",
                f"transport {self.kv!r} is registered in this process, and worker processes do not "
                "know it",
                "install it as a package with an entry point `sagellm.transports`",
            )
            return
        try:
            requirement = TRANSPORTS.find(self.kv).requires
        except BrokenEntryPoint as error:
            yield OptionConflict("kv", str(error), "fix or remove that package")
        except ValueError as error:
            yield OptionConflict("kv", str(error), f"choose one of {', '.join(TRANSPORTS)}")
        else:
            if requirement is not None and not requirement.is_met:
                cause = f"{requirement.product} is not installed"
                yield OptionConflict("kv", cause, requirement.fix)


EXECUTORS: dict[str, type] = {"tasks": TasksOptions, "processes": ProcessesOptions}


def executor_options(graph: Graph) -> TasksOptions | ProcessesOptions:
    """The options of a graph's executor. Raises OptionError."""
    executor = graph.attrs.get("executor")
    options = dict(executor) if isinstance(executor, FrozenMap) else {}
    kind = options.pop("kind", "tasks")
    if kind == "tasks":
        return read_options(TasksOptions, options)
    return read_options(ProcessesOptions, options)


def processes_options(graph: Graph) -> ProcessesOptions | None:
    """The options of executor `processes`; None: the graph has another executor. Raises
    OptionError.
    """
    options = executor_options(graph)
    return options if isinstance(options, ProcessesOptions) else None
