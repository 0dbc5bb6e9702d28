"""An HTTP server of a test's own: what it answers, and how it breaks off, a script says."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11
import trio
from anyio.from_thread import start_blocking_portal

MODEL = "scripted"


@dataclass
class Call:
    """One request to the server, and the ways to answer it."""

    stream: trio.SocketStream
    http: h11.Connection
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def head(self, status: int = 200, **headers: str) -> None:
        """Begin an answer without a length: its body is chunked."""
        pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
        await self._send(h11.Response(status_code=status, headers=pairs))

    async def send(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def whole(self, content: Any, status: int = 200, **headers: str) -> None:
        """A whole answer; anything but bytes is sent as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        await self.head(status, **{"content_type": "application/json", **headers})
        await self.send(data)
        await self.end()

    async def events(self, *data: Any) -> None:
        """Begin a stream of events and send these, one write each."""
        await self.head(content_type="text/event-stream")
        for one in data:
            await self.event(one)

    async def event(self, data: Any) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        await self.send(f"data: {text}\n\n".encode())

    async def done(self) -> None:
        await self.event("[DONE]")
        await self.end()

    async def cut(self) -> None:
        """Close the connection in the middle of the body."""
        await self.stream.aclose()

    async def gone(self) -> None:
        """Wait until the client has left."""
        with suppress(trio.BrokenResourceError):
            while await self.stream.receive_some(4096):
                pass

    async def _send(self, event: Any) -> None:
        await self.stream.send_all(self.http.send(event) or b"")


Script = Callable[[Call], Awaitable[None]]


@dataclass
class Server:
    """Where the server is, and what it was asked."""

    script: Script
    url: str = ""
    calls: list[Call] = field(default_factory=list)

    @property
    def asked(self) -> list[Any]:
        """The bodies of all POSTs, in order."""
        return [call.json for call in self.calls if call.method == "POST"]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.start_soon(trio.serve_listeners, self._serve, [listener])
            task_status.started()

    async def _serve(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while (call := await self._read(stream, http)) is not None:
                self.calls.append(call)
                await self._answer(call)
                if http.our_state is not h11.DONE:
                    return
                http.start_next_cycle()

    async def _answer(self, call: Call) -> None:
        if call.path == "/v1/models":
            await call.whole({"object": "list", "data": [{"id": MODEL}]})
        else:
            await self.script(call)

    async def _read(self, stream: trio.SocketStream, http: h11.Connection) -> Call | None:
        request, body = None, b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                headers = {name.decode(): value.decode() for name, value in request.headers}
                method, path = request.method.decode(), request.target.decode()
                return Call(stream, http, method, path, headers, body)
            else:
                return None


@contextmanager
def scripted(script: Script) -> Iterator[Server]:
    """The server in a thread of its own, for as long as the block runs."""
    server = Server(script)
    with start_blocking_portal("trio") as portal:
        future, _ = portal.start_task(server.run)
        try:
            yield server
        finally:
            future.cancel()


def text(content: str, finish_reason: str | None = None, index: int = 0) -> dict[str, Any]:
    """A chunk of /v1/completions."""
    choice = {"index": index, "text": content, "finish_reason": finish_reason}
    return {"id": "cmpl-1", "model": MODEL, "choices": [choice]}


def delta(content: str | None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat."""
    said = {**({} if content is None else {"content": content}), **more}
    choice = {"index": 0, "delta": said, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "model": MODEL, "choices": [choice]}


def used(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk that tells the usage."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {"choices": [], "usage": {**usage, "total_tokens": prompt + completion}}


def error(message: str, status: int, **more: Any) -> dict[str, Any]:
    """The body of a refusal."""
    return {"error": {"message": message, "type": "server_error", "code": status, **more}}


def telling(*words: str) -> Script:
    """A script that answers every call with these words: a chunk each, or whole."""

    async def script(call: Call) -> None:
        asked = call.json
        is_chat = call.path.endswith("/chat/completions")
        if not asked.get("stream"):
            said = {"role": "assistant", "content": "".join(words)}
            choice = {"message": said} if is_chat else {"text": "".join(words)}
            choices = [{"index": 0, "finish_reason": "stop", **choice}]
            usage = used(3, len(words))["usage"]
            return await call.whole({"id": "x", "model": MODEL, "choices": choices, "usage": usage})
        if is_chat:
            await call.events(delta("", role="assistant"), *(delta(word) for word in words))
            await call.event(delta(None, "stop"))
        else:
            await call.events(*(text(word) for word in words), text("", "stop"))
        if asked.get("stream_options"):
            await call.event(used(3, len(words)))
        await call.done()

    return script


def tool_call(name: str, arguments: str, index: int = 0) -> dict[str, Any]:
    """A call of a tool, as answers have it."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{index}", "type": "function", "function": function}


def calling(*calls: tuple[str, str], reasoning: str | None = None) -> Script:
    """A script of a model that calls these tools first, and then repeats what they returned."""

    async def script(call: Call) -> None:
        results = [one["content"] for one in call.json["messages"] if one["role"] == "tool"]
        if results:
            return await telling(" ".join(results))(call)
        asked = [tool_call(*each, index) for index, each in enumerate(calls)]
        said = {"role": "assistant", "content": None, "tool_calls": asked, "reasoning": reasoning}
        if not call.json.get("stream"):
            choice = {"index": 0, "message": said, "finish_reason": "tool_calls"}
            return await call.whole({"id": "x", "model": MODEL, "choices": [choice]})
        await call.events(delta("", role="assistant"))
        if reasoning:
            await call.event(delta(None, reasoning=reasoning))
        for index, each in enumerate(asked):
            for part in _parts_of(each, index):
                await call.event(delta(None, tool_calls=[part]))
        await call.event(delta(None, "tool_calls"))
        await call.done()

    return script


def _parts_of(call: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """The chunks of one tool call: its name first, and its arguments in two pieces."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    first = {**call, "index": index, "function": {"name": name, "arguments": ""}}
    pieces = (arguments[:5], arguments[5:])
    return [first, *({"index": index, "function": {"arguments": piece}} for piece in pieces)]
