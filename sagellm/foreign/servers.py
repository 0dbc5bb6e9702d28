"""The servers behind a running graph: registered, drained and removed while it runs."""

import os
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import httpx2
import trio

from sagellm.client.http_calls import read_url
from sagellm.client.responses import ClientError
from sagellm.foreign.foreign_engine import ForeignEngine
from sagellm.foreign.openai_kind import OpenAIOptions, open_openai
from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger
from sagellm.graphs.sections import OPENAI, engine_kind
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.graph_engines import engine_options
from sagellm.runtime.cluster.control import (
    ControlCommands,
    ControlReply,
    ControlRequest,
    ServerState,
    ServerStatus,
)
from sagellm.runtime.engine.kinds import ReplicaPlace
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.executors.tasks import TasksExecutor

log = get_logger("sagellm.foreign")


class ServerError(ValueError):
    """A server that cannot be registered, drained or removed."""


@dataclass(slots=True)
class _Server:
    url: str
    engine: ForeignEngine
    is_draining: bool = False
    is_stopped: bool = False

    @property
    def state(self) -> ServerState:
        if self.is_stopped:
            return "STOPPED"
        if self.is_draining:
            return "DRAINING"
        return "READY" if self.engine.is_up else "ERROR"


@dataclass(slots=True)
class Servers:
    """The servers of all engines of kind `openai` of one running graph.

    A registered server is one more replica of its engine, so routing, queues and failover treat it
    as the servers of the graph file. A drained server gets no more requests; it is removed when its
    last answer has ended.
    """

    graph: Graph
    executor: TasksExecutor
    _known: dict[tuple[str, int], _Server] = field(default_factory=dict)
    _registering: trio.Lock = field(default_factory=trio.Lock)

    def __post_init__(self) -> None:
        for name, replicas in self.executor.engines.items():
            for number, engine in enumerate(replicas):
                if isinstance(engine, ForeignEngine):
                    self._known[name, number] = _Server(engine.url, engine)

    def statuses(self) -> list[ServerStatus]:
        """All servers, by engine and number."""
        return [
            ServerStatus(
                graph=self.graph.name,
                graph_pid=os.getpid(),
                engine=name,
                replica=number,
                url=server.url,
                model=server.engine.facts.model,
                state=server.state,
                num_running=server.engine.load.num_running,
            )
            for (name, number), server in sorted(self._known.items())
        ]

    async def register(self, engine: str, url: str) -> ServerStatus:
        """Add a server to an engine, once it has answered. Raises ServerError.

        A registered address is not chosen by the owner of the graph file: link-local addresses,
        where clouds keep the keys of a machine, are refused.
        """
        options = self._options(engine)
        try:
            whole = read_url(url)
        except ClientError as error:
            raise ServerError(error.message) from None
        await _check_address(whole)
        async with self._registering:
            if any(
                one.url == whole and name == engine and not one.is_stopped
                for (name, _), one in self._known.items()
            ):
                raise ServerError(f"{whole} is a server of {engine} already")
            number = len(self.executor.engines[engine])
            try:
                asked = replace(options, urls=(whole,), start_s=0.0)
                opened = await open_openai(asked, ReplicaPlace(engine))
            except EngineOptionError as error:
                raise ServerError(str(error).removeprefix("urls: ")) from None
            opened.place = opened.place._replace(number=number)
            self.executor.add(engine, opened)
            self._known[engine, number] = _Server(whole, opened)
            self.executor.mark(engine, number, is_up=True)
        log.info("server_registered", engine=f"{engine}[{number}]", url=whole)
        return self._status(engine, number)

    async def remove(self, engine: str, replica: int, *, force: bool = False) -> ServerStatus:
        """Give a server no more requests, wait for its answers, and remove it. Raises ServerError.

        With `force`, its answers go on at other servers at once.
        """
        self._options(engine)
        server = self._known.get((engine, replica))
        if server is None or server.is_stopped:
            raise ServerError(f"{engine} has no server {replica}")
        server.is_draining = True
        server.engine.report_availability(lambda is_up: None)
        self.executor.mark(engine, replica, is_up=False)
        if not force:
            await server.engine.drained()
        server.is_stopped = True
        server.engine.stop()
        self.executor.remove(engine, replica)
        log.info("server_removed", engine=f"{engine}[{replica}]", url=server.url)
        return self._status(engine, replica)

    def _status(self, engine: str, replica: int) -> ServerStatus:
        return next(
            one for one in self.statuses() if (one.engine, one.replica) == (engine, replica)
        )

    def _options(self, engine: str) -> OpenAIOptions:
        """The options of an engine that takes servers. Raises ServerError."""
        kinds = {name: engine_kind(values) for name, values in self.graph.engines.items()}
        able = [name for name, kind in kinds.items() if kind == OPENAI]
        if engine not in able:
            close = nearest(engine, able)
            there = f"there are {', '.join(able)}" if able else "the graph has none"
            hint = f"did you mean {close}?" if close else there
            raise ServerError(f"no engine {engine!r} of kind openai: {hint}")
        if not self.executor.is_routed(engine):
            raise ServerError(f"no `route` leads to engine {engine}; put one before its operator")
        options = engine_options(self.graph, engine)
        assert isinstance(options, OpenAIOptions)
        return options


@dataclass(frozen=True, slots=True)
class ServerCommands:
    """The commands on servers, beside the `others` of a graph. Implements ControlCommands."""

    servers: Servers
    others: ControlCommands

    async def execute(self, asked: ControlRequest) -> ControlReply:
        servers = self.servers
        try:
            match asked.command:
                case "servers":
                    return ControlReply(servers=tuple(servers.statuses()))
                case "register":
                    return ControlReply(servers=(await servers.register(asked.engine, asked.url),))
                case "remove":
                    number = asked.replica or 0
                    found = await servers.remove(asked.engine, number, force=asked.force)
                    return ControlReply(servers=(found,))
        except ServerError as error:
            return ControlReply(error=str(error))
        return await self.others.execute(asked)


async def _check_address(url: str) -> None:
    """Raise ServerError for a host that is, or resolves to, a link-local or multicast address."""
    host = httpx2.URL(url).host
    try:
        found = await trio.socket.getaddrinfo(host, None)
    except OSError as error:
        raise ServerError(f"{host} is not known: {error}") from None
    for *_, address in found:
        read: IPv4Address | IPv6Address = ip_address(str(address[0]).partition("%")[0])
        mapped = getattr(read, "ipv4_mapped", None) or read
        if mapped.is_link_local or mapped.is_multicast or mapped.is_unspecified:
            raise ServerError(f"{host} is the address {read}, where no server may be registered")
