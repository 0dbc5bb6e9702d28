"""A gateway without a server: scripted bridges, and clients that can leave or stop reading."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
from starlette.requests import Request

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.budgets import Budgets
from sagellm.gateway.gateway import Gateway, HostedModel
from sagellm.gateway.graph_bridge import NOW, GraphBridge
from sagellm.gateway.http.call import Call
from sagellm.gateway.metrics.meters import NoMeters
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Budget, Settings, Streaming
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.runtime.messages import TokenEvent
from sagellm.runtime.models.tokenizer import ByteTokenizer, Tokenizer
from sagellm.session.requests import Timing

MAX_MODEL_LEN = 64


class CountingMeters(NoMeters):
    def __init__(self) -> None:
        self.num_disconnects = 0

    def disconnected(self) -> None:
        self.num_disconnects += 1


def event(text: str = "", *, choice: int = 0, num: int | None = None, **fields: Any) -> TokenEvent:
    """`num` tokens, one a byte unless said, of one choice."""
    content = text.encode()
    token_ids = tuple(content if num is None else [0] * num)
    known = {"num_prompt_tokens": 3, "num_cached_tokens": 2, **fields}
    return TokenEvent(request_id="r", choice=choice, text=text, token_ids=token_ids, **known)


def last(text: str = "", reason: Any = "stop", **fields: Any) -> TokenEvent:
    return event(text, finish_reason=reason, **fields)


Batches = Sequence[Sequence[TokenEvent] | anyio.Event]


@dataclass
class ScriptedBridge:
    """Plays batches to each request: `script(request)`. At an Event it waits."""

    script: Callable[[GraphRequest], Batches]
    requests: list[GraphRequest] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open_stream(
        self, request: GraphRequest, timing: Timing = NOW
    ) -> AsyncIterator[AsyncIterator[Sequence[TokenEvent]]]:
        self.requests.append(request)
        self.timings.append(timing)
        try:
            yield _Played(self.script(request))
        finally:
            self.left.append(request.request_id)

    async def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        return True

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False


class _Played:
    def __init__(self, batches: Batches) -> None:
        self._batches = iter(batches)

    def __aiter__(self) -> "_Played":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        for batch in self._batches:
            await anyio.lowlevel.checkpoint()
            if not isinstance(batch, anyio.Event):
                return batch
            await batch.wait()
        raise StopAsyncIteration


def playing(*batches: Sequence[TokenEvent] | anyio.Event) -> ScriptedBridge:
    return ScriptedBridge(lambda request: batches)


NAMES = ("m", "alias")
CARD = ModelCard(names=NAMES, root="m", max_model_len=MAX_MODEL_LEN, vocab_size=256, created=7)


def gateway_before(
    bridge: GraphBridge,
    *,
    tokenizer: Tokenizer | None = None,
    model: ModelCard = CARD,
    streaming: Streaming = Streaming(),  # noqa: B008 (an immutable value)
    **fields: Any,
) -> Gateway:
    settings = Settings(served_models=NAMES, streaming=streaming)
    known: dict[str, Any] = {
        "settings": settings,
        "bridge": bridge,
        "models": (HostedModel(model, tokenizer or ByteTokenizer()),),
        "readiness": Readiness(),
        "budgets": Budgets(Budget()),
        "meters": CountingMeters(),
    }
    return Gateway(**{**known, **fields})


@dataclass
class Answered:
    """What one call's client got. `sends`: the bodies, as they were sent one by one."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sends: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.sends)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[str]:
        """The blocks of a stream, each without its empty line."""
        assert self.body.endswith(b"\n\n")
        return self.body.decode().split("\n\n")[:-1]

    @property
    def events(self) -> list[Any]:
        """The data of a whole stream, [DONE] checked and left out."""
        data = [line.removeprefix("data: ") for line in self.lines if not line.startswith(":")]
        assert data[-1] == "[DONE]"
        return [json.loads(text) for text in data[:-1]]

    @property
    def deltas(self) -> list[Any]:
        """(index, text) of every chunk that has some choice."""
        choices = [choice for chunk in self.events for choice in chunk.get("choices", ())]
        return [
            (choice["index"], choice.get("text") or choice.get("delta", {}).get("content", ""))
            for choice in choices
        ]

    def text(self, index: int = 0) -> str:
        return "".join(text for number, text in self.deltas if number == index)


class Client:
    """One HTTP client: `gone` set, it leaves; `reads` cleared, it stops reading."""

    def __init__(self, body: Any = None, **path_params: str) -> None:
        self.answered = Answered()
        self.gone = anyio.Event()
        self.reads = anyio.Event()
        self.reads.set()
        self.sent = anyio.Event()  # at each send, and then a new one
        self._content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._is_read = False
        self._is_sent_to = False
        self._path_params = path_params

    async def call(self, endpoint: Any, gateway: Gateway, **call: Any) -> Answered:
        """Run the endpoint and its response, as the app does. An ApiError is its answer."""
        scope = self.scope(**call)
        request = Request(scope, self.receive, self.send)
        try:
            response = await endpoint(gateway, request)
            await response(scope, self.receive, self.send)
        except ApiError as error:
            assert not self.answered.status
            self.answered = Answered(status=error.status, sends=[error.encoded], is_whole=True)
        return self.answered

    def scope(self, **call: Any) -> dict[str, Any]:
        facts = Call(**{"request_id": "abc", "tenant": "t", **call})
        return {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [],
            "query_string": b"",
            "state": {"call": facts},
            "path_params": self._path_params,
        }

    async def received(self, num_sends: int) -> None:
        """Wait until so many pieces of the body have come."""
        while len(self.answered.sends) < num_sends:
            await self.sent.wait()

    async def receive(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._content, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        assert not self._is_sent_to, "two sends at once"
        self._is_sent_to = True
        try:
            await self.reads.wait()
        finally:
            self._is_sent_to = False
        answered = self.answered
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            if message.get("body"):
                answered.sends.append(message["body"])
            answered.is_whole = not message.get("more_body", False)
        self.sent.set()
        self.sent = anyio.Event()


async def post(endpoint: Any, bridge: GraphBridge, body: Any, **gateway: Any) -> Answered:
    """One whole call."""
    return await Client(body).call(endpoint, gateway_before(bridge, **gateway))
