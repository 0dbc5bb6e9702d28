"""Worker processes behind relays."""

import random
import socket
from itertools import count

import trio

from sagellm.chaos.relay import Relay
from sagellm.logs import inherited
from sagellm.runtime.cluster.launch import Processes, ProcessLife
from sagellm.runtime.cluster.options import ProcessesOptions

MODULE = "sagellm.chaos.worker"


class RelayedProcesses(Processes):
    """As `Processes`; `relays` has that of each process, by its pid."""

    def __init__(self, options: ProcessesOptions, seed: int = 0) -> None:
        super().__init__(MODULE, options.address, options.keys, inherited())
        self.relays: dict[int, Relay] = {}
        self._draw = random.Random(seed)
        self._numbers = count()
        self._nursery: trio.Nursery | None = None
        self._next: Relay | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            await super().run(task_status)

    def launch(self, epoch: int) -> ProcessLife:
        life = super().launch(epoch)
        assert self._next is not None
        self.relays[life.pid] = self._next
        return life

    def _door(self) -> str:
        assert self._nursery is not None
        scheme, _, place = self._endpoint.partition("://")
        if scheme == "ipc":
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            door = f"{self.folder}/relay-{next(self._numbers)}"
            listening.bind(door)
            address: str | tuple[str, int] = place
        else:
            host, port = place.rsplit(":", 1)
            listening = socket.create_server(("127.0.0.1", 0))
            door = f"127.0.0.1:{listening.getsockname()[1]}"
            address = (host.strip("[]"), int(port))
        listening.listen()
        listening.setblocking(False)
        self._next = Relay(listening, socket.AddressFamily(_family(address)), address, self._draw)
        self._nursery.start_soon(self._next.run)
        return f"{scheme}://{door}"


def _family(address: str | tuple[str, int]) -> int:
    if isinstance(address, str):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET
