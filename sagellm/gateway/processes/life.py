"""One process of a gateway, from its start to its end, as the graph's process sees it."""

import socket
from collections.abc import Callable
from contextlib import aclosing

import trio
from anyio.abc import UNIXSocketStream

from sagellm.gateway.processes.desk import Desk
from sagellm.gateway.processes.link import Link
from sagellm.gateway.processes.messages import (
    Ask,
    Counted,
    Enter,
    FromGateway,
    Idle,
    Leave,
    Setup,
    Taken,
)
from sagellm.gateway.processes.start import Start
from sagellm.gateway.settings import Streaming
from sagellm.runtime.cluster.process import Process
from sagellm.session import Session

MODULE = "sagellm.gateway.processes.main"
ASK_S = 1.0  # how often it is asked for what it has counted, which is a sign of life, too
SILENT_S = 10.0  # after which it counts as dead: to parse the largest body takes it 0.2 s
EXIT_S = 1.0  # what a process takes from its last word to its end


class Life:
    """`counted`: what it said last of what it counted. `is_idle`: it was drained, and is done."""

    def __init__(self, process: Process, stream: UNIXSocketStream) -> None:
        self.link: Link[FromGateway] = Link(stream, FromGateway)
        self.desk: Desk | None = None
        self.counted: Counted | None = None
        self.is_idle = False
        self._process = process
        self._stream = stream
        self._heard_s = trio.current_time()
        self._why = ""
        self._num_asked = 0

    @classmethod
    async def begin(cls, start: Callable[[int], Start]) -> "Life":
        """`start` is given the process's end of the link. Raises OSError."""
        here, there = socket.socketpair()
        with there:
            begun = start(there.fileno())
            try:
                process = Process(MODULE, begun.env, begun.files)
            except OSError:
                here.close()
                raise
        return cls(process, await UNIXSocketStream.from_socket(here))

    async def run(
        self,
        session: Session,
        streaming: Streaming,
        setup: Setup,
        hear: Callable[[FromGateway], None],
    ) -> str:
        """Take its requests to the session, and tell the rest to `hear`; returns why it ended.

        Its requests are cancelled with it. Cancelled, it is killed.
        """
        self.link.put(setup)
        is_over = False
        try:
            async with trio.open_nursery() as nursery:
                self.desk = Desk(session, streaming, self.link, nursery)
                nursery.start_soon(self.link.send)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                async with aclosing(self.link.messages()) as messages:
                    async for message in messages:
                        self._hear(message, hear)
                is_over = True
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(EXIT_S if is_over else 0.0)
        return self._why

    def ask(self) -> int:
        """Ask for what it has counted by now: `counted` will have this number, or a higher one."""
        self._num_asked += 1
        self.link.put(Ask(self._num_asked))
        return self._num_asked

    def _hear(self, message: FromGateway, hear: Callable[[FromGateway], None]) -> None:
        self._heard_s = trio.current_time()
        if isinstance(message, Enter | Taken | Leave):
            assert self.desk is not None
            self.desk.hear(message)
            return
        if isinstance(message, Counted):
            self.counted = message
        elif isinstance(message, Idle):
            self.is_idle = True
        hear(message)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Ask for signs of life; end a life that gives none, but not for what we did not hear."""
        while True:
            asked_s = trio.current_time()
            self.ask()
            await trio.sleep(ASK_S)
            now = trio.current_time()
            if now - asked_s > 2 * ASK_S:
                self._heard_s = now
            if now - self._heard_s > SILENT_S:
                self._why = f"no sign of life for {now - self._heard_s:.0f} s"
                scope.cancel()

    async def _end(self, patience_s: float) -> None:
        with trio.move_on_after(patience_s):  # whoever ends by itself says how
            await self._process.wait()
        self._process.kill()
        code = await self._process.wait()
        self._why = self._why or (f"signal {-code}" if code < 0 else f"exit code {code}")
        self._process.close()
        await self._stream.aclose()
