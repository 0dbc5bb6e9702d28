"""The corridor: the modules of sagellm whose functions one streamed chat over HTTP calls, in order
of the first call.
"""

import inspect
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import trio

from sagellm import Graph
from sagellm.gateway.graph_bridge import SessionBridge
from sagellm.gateway.http.app import App, build_app
from sagellm.gateway.lifecycle import gateway_of, meters_of
from sagellm.gateway.protocol.sampling_params import model_cards
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Settings

BODY = {
    "messages": [{"role": "user", "content": "What is 23 + 45?"}],
    "max_tokens": 4,
    "stream": True,
}
CONTENT = json.dumps(BODY).encode()
OURS = "sagellm"


class Corridor:
    """Records the module of each function that any thread calls inside a block of `open`."""

    def __init__(self) -> None:
        self.modules: dict[str, None] = {}
        self._is_open = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Profile this thread, and all threads that start in the block."""
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def open(self) -> Iterator[None]:
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if not self._is_open or event != "call":
            return
        module = str(frame.f_globals.get("__name__"))
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # unset for a module's body
        if is_function and module.partition(".")[0] == OURS:
            self.modules.setdefault(module)


def corridor() -> list[str]:
    """The modules of the second of two equal chats, in one process under trio."""
    found = Corridor()
    with found.watched():
        trio.run(_chat_twice, found)
    return list(found.modules)


async def _chat_twice(found: Corridor) -> None:
    settings = Settings(served_models=("sage-tiny",))
    async with Graph.load("joint").open() as session:
        cards = model_cards(session, settings)
        bridge = SessionBridge(session, settings.streaming)
        meters = meters_of(session, settings, cards)
        app = build_app(gateway_of(session, settings, bridge, meters, cards, Readiness()))
        await _chat(app)  # the first chat also initialises modules, which is not counted
        await session.idle()
        with found.open():
            await _chat(app)


async def _chat(app: App) -> None:
    sent: list[bytes] = []
    incoming = [{"type": "http.request", "body": CONTENT, "more_body": False}]

    async def receive() -> Any:
        if not incoming:
            await trio.sleep_forever()  # the client stays connected
        return incoming.pop()

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message.get("body", b""))

    await app(_scope(), receive, send)
    events = b"".join(sent)
    assert events.endswith(b"data: [DONE]\n\n"), events
    assert b'"content":"6' in events, events


def _scope() -> dict[str, Any]:
    path = "/v1/chat/completions"
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(CONTENT)).encode()),
        ],
        "client": ("127.0.0.1", 1),
    }


if __name__ == "__main__":
    for number, module in enumerate(corridor(), 1):
        print(number, module)
