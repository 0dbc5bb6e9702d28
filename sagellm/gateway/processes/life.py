"""One process of a gateway, from its start to its end, as the graph's process sees it."""

import socket
from collections.abc import Callable
from contextlib import aclosing

import trio
from anyio.abc import UNIXSocketStream

from sagellm.gateway.processes.desk import Desk
from sagellm.gateway.processes.link import Link
from sagellm.gateway.processes.main import Start
from sagellm.gateway.processes.messages import (
    Ask,
    Counted,
    Enter,
    FromGateway,
    Idle,
    Leave,
    Leaving,
    Setup,
    Taken,
    Up,
)
from sagellm.gateway.settings import Streaming
from sagellm.runtime.cluster.process import Process
from sagellm.session import Session

MODULE = "sagellm.gateway.processes.main"
START_S = 60.0  # until it takes connections
ASK_S = 1.0  # how often it is asked for what it has counted, which is a sign of life, too
SILENT_S = 10.0  # after which it counts as dead, if it does not compute
BUSY_S = 60.0  # the same, if it does: many large bodies at once take long to parse
EXIT_S = 1.0  # what a process takes from its last word to its end


class Life:
    """`counted`: what it said last of what it counted. `is_idle`: it was drained, and is done.
    `is_over`: it has ended, or leaves; another may take its place.
    """

    def __init__(self, process: Process, stream: UNIXSocketStream) -> None:
        self.link: Link[FromGateway] = Link(stream, FromGateway)
        self.desk: Desk | None = None
        self.counted: Counted | None = None
        self.is_up = self.is_idle = self.is_over = False
        self.why = ""  # it ended
        self._process = process
        self._stream = stream
        self._num_asked = 0
        self._heard_s = trio.current_time()
        self._cpu_s = 0.0

    @classmethod
    async def begin(cls, start: Callable[[int], Start], setup: Callable[[], Setup]) -> "Life":
        """`start` is given the process's end of the link; what `setup` gives is all that is known
        when this returns. Raises OSError.
        """
        here, there = socket.socketpair()
        with there:
            begun = start(there.fileno())
            try:
                process = Process(MODULE, begun.env, begun.files)
            except OSError:
                here.close()
                raise
        life = cls(process, await UNIXSocketStream.from_socket(here))
        life.link.put(setup())  # before anything else that it is told
        return life

    async def run(
        self,
        session: Session,
        streaming: Streaming,
        claimed: set[str],
        hear: Callable[[FromGateway], None],
    ) -> None:
        """Until it ends: take its requests to the session, and tell the rest to `hear`.

        Its requests are cancelled with it. Cancelled, it is killed. `claimed`: see Desk.
        """
        has_left = False
        try:
            async with trio.open_nursery() as nursery:
                self.desk = Desk(session, streaming, claimed, self.link, nursery, self)
                nursery.start_soon(self.link.send)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                async with aclosing(self.link.messages()) as messages:
                    async for message in messages:
                        self._hear(message, hear)
                has_left = True
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(EXIT_S if has_left else 0.0)

    def ask(self) -> int:
        """Ask for what it has counted by now: `counted` will have this number, or a higher one."""
        self._num_asked += 1
        self.link.put(Ask(self._num_asked))
        return self._num_asked

    def ask_once(self) -> int:
        """As `ask`, unless an answer is owed already; the number of that question."""
        return self._num_asked if not self.has_answered(self._num_asked) else self.ask()

    def has_answered(self, number: int) -> bool:
        return self.counted is not None and self.counted.number >= number

    def _hear(self, message: FromGateway, hear: Callable[[FromGateway], None]) -> None:
        self._heard_s = trio.current_time()
        match message:
            case Enter() | Taken() | Leave():
                assert self.desk is not None
                self.desk.hear(message)
                return
            case Counted():
                self.counted = message
            case Up():
                self.is_up = True
            case Idle():
                self.is_idle = True
            case Leaving():
                self.is_over = True
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
            before, self._cpu_s = self._cpu_s, self._process.cpu_s
            patience_s = BUSY_S if self._cpu_s > before else SILENT_S
            if now - self._heard_s > (patience_s if self.is_up else START_S):
                self.why = f"no sign of life for {now - self._heard_s:.0f} s"
                scope.cancel()

    async def _end(self, patience_s: float) -> None:
        with trio.move_on_after(patience_s):  # whoever ends by itself says how
            await self._process.wait()
        self._process.kill()
        code = await self._process.wait()
        self.why = self.why or (f"signal {-code}" if code < 0 else f"exit code {code}")
        self.is_over = True
        self._process.close()
        await self._stream.aclose()
