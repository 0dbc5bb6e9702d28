"""Sends load to an OpenAI-compatible server, in a closed or an open loop.

guidellm and aiperf do more, but install torch, transformers and a hundred other packages, which
should not be necessary next to a server. Every figure has the definition of these tools, so that
results can be compared.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from sagellm.client.http_calls import CHAT, COMPLETIONS, encode_call, is_stream, not_streamed
from sagellm.client.replies import Choice, ResponseBody
from sagellm.client.reply_streams import ChunkReader
from sagellm.client.responses import TIMED_OUT, BodyBytes, ClientError
from sagellm.client.server import AsyncServerConnection
from sagellm.load.workload import PlannedRequest, Prompts
from sagellm.runtime.messages import NORMAL

REFUSALS = (429, 503)


@dataclass(slots=True)
class RequestRecord:
    """One request and its answer. Times are seconds since the load began.

    Latencies count from the first attempt to send, even if the server refused it. TTFT ends with
    the first token; a chunk with only a role, or an empty last chunk, is no token. `itl_s`: the
    times between consecutive events with tokens. A server that puts several tokens into one event
    has fewer and longer ITLs, but the same `tpot_s`.
    """

    number: int
    planned_s: float
    sent_s: float
    input_len: int  # as planned, in tokens or words
    output_len: int
    first_s: float | None = None
    last_s: float | None = None  # the last token
    ended_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    num_events: int = 0  # events with tokens
    num_attempts: int = 1
    num_refusals: int = 0
    prompt_tokens: int | None = None  # the server's count
    completion_tokens: int | None = None
    finish_reason: str | None = None
    status: int | None = None
    error: str | None = None  # the class of the error: http_429, timed_out, cut_off, ...
    message: str | None = None  # the server's message
    code: str | None = None  # the server's code

    def token(self, now_s: float) -> None:
        """Record an event with tokens."""
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.itl_s.append(now_s - self.last_s)
        self.last_s = now_s
        self.num_events += 1

    def last(self, now_s: float) -> None:
        """Record an event with only a finish reason: it stands for an EOS token, without text."""
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def lag_s(self) -> float:
        """How late this client sent the request, in seconds."""
        return self.sent_s - self.planned_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def num_tokens(self) -> int:
        """The tokens of the answer, as the server counts them, or else the number of events."""
        return self.num_events if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """The mean seconds per token after the first token; None for fewer than two tokens."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0  # before a retry, unless the server says how long


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """The settings that all requests of a load share."""

    model: str
    is_chat: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    num_retries: int = 0
    timeout_s: float = 600.0
    seed: int = 0


class Sender:
    """Sends the requests of one load to one server. The load begins when it is created."""

    def __init__(self, server: AsyncServerConnection, target: LoadTarget, prompts: Prompts) -> None:
        self._server = server
        self._target = target
        self._prompts = prompts
        self._draw = Random(f"{target.seed}/waits")
        self.started_s = trio.current_time()

    @property
    def now_s(self) -> float:
        return trio.current_time() - self.started_s

    async def send(self, number: int, arrival: PlannedRequest, planned_s: float) -> RequestRecord:
        """Send one request, with retries. Errors are written to the record, and not raised."""
        content = self._content(number, arrival)
        lengths = arrival.input_len, arrival.output_len
        record = RequestRecord(number, planned_s, self.now_s, *lengths)
        try:
            with trio.fail_after(self._target.timeout_s):
                await self._attempts(content, record)
        except trio.TooSlowError:
            record.error = TIMED_OUT
        except ClientError as error:
            record.status = error.status or record.status
            record.error, record.message = error_class(error), error.message
            record.code = error.code
        record.ended_s = record.ended_s or self.now_s
        return record

    def _content(self, number: int, arrival: PlannedRequest) -> bytes:
        prompt = self._prompts.make(number, arrival.input_len, arrival.block_ids)
        if self._target.is_chat:
            call: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            call = {"prompt": prompt}
        wanted = {"max_tokens": arrival.output_len, "stream_options": {"include_usage": True}}
        call |= wanted | _request_fields(arrival)
        return encode_call(call, self._target.options, self._target.model, True)

    async def _attempts(self, content: bytes, record: RequestRecord) -> None:
        while True:
            try:
                return await self._attempt(content, record)
            except ClientError as error:
                if error.status not in REFUSALS or record.first_s is not None:
                    raise  # not a refusal, or one in the middle of an answer: do not retry
                record.num_refusals += 1
                if record.num_attempts > self._target.num_retries or error.should_retry is False:
                    raise
                await trio.sleep(self._wait_s(error, record.num_attempts))
                record.num_attempts += 1

    def _wait_s(self, error: ClientError, num_attempts: int) -> float:
        """Seconds to wait before a retry: the server's Retry-After, or else exponential backoff.

        The backoff has jitter, so that clients do not retry at the same time.
        """
        if error.retry_after_s is not None:
            return error.retry_after_s
        longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (num_attempts - 1))
        return self._draw.uniform(0.5 * longest_s, longest_s)

    async def _attempt(self, content: bytes, record: RequestRecord) -> None:
        path = CHAT if self._target.is_chat else COMPLETIONS
        response = await self._server.send("POST", path, content)
        record.status = response.status_code
        if not is_stream(response.headers):
            raise not_streamed(await self._server.read(response))
        async with BodyBytes(response, self._server.url) as body:
            await self._stream(body, record)

    async def _stream(self, body: BodyBytes, record: RequestRecord) -> None:
        reader = ChunkReader()
        while not reader.is_over:
            data = await body.next()
            now_s = self.now_s  # all events of one read arrived at the same time
            reader.end() if data is None else reader.feed(data)
            while (chunk := reader.next()) is not None:
                _note(chunk, record, now_s)
        record.ended_s = now_s
        await body.finish()  # not part of the answer's time


def _request_fields(planned: PlannedRequest) -> dict[str, Any]:
    """The fields of a call for what the plan of its request says. All calls have one model."""
    fields: dict[str, Any] = {"user": planned.user_id} if planned.user_id else {}
    if planned.priority != NORMAL:
        fields["priority"] = planned.priority
    if planned.slo_ttft_s is not None:
        fields["slo_ttft_s"] = planned.slo_ttft_s
    return fields


def error_class(error: ClientError) -> str:
    """The class under which an error is counted: its HTTP status, or the ClientError's code."""
    return f"http_{error.status}" if error.status is not None else error.code or "failed"


def _note(chunk: ResponseBody, record: RequestRecord, now_s: float) -> None:
    if any(_has_token(choice) for choice in chunk.choices):
        record.token(now_s)
    elif any(choice.finish_reason is not None for choice in chunk.choices):
        record.last(now_s)
    for choice in chunk.choices:
        record.finish_reason = choice.finish_reason or record.finish_reason
    if chunk.usage is not None:
        record.prompt_tokens = chunk.usage.prompt_tokens
        record.completion_tokens = chunk.usage.completion_tokens


def _has_token(choice: Choice) -> bool:
    """Whether a choice of a chunk has a token.

    A chunk of reasoning or of a tool call has one. So has a chunk without any part (the token is an
    incomplete character, or may begin a tool call), unless the chunk has a finish reason.
    """
    if choice.is_opening:
        return False
    has_part = bool(choice.content or choice.reasoning or choice.tool_calls)
    return has_part or choice.finish_reason is None


SendRequest = Callable[
    [int, PlannedRequest, float], Awaitable[RequestRecord]
]  # number, request, when it was planned


@dataclass(slots=True)
class LoadDriver:
    """Sends the requests of one load on time. Cancelling `stop` ends sending; open requests finish.

    When a request ends, its record is added to `records`, and `report` is called with it.
    """

    send: SendRequest
    now_s: Callable[[], float]  # seconds since the load began
    report: Callable[[RequestRecord], None] = lambda record: None
    stop: trio.CancelScope = field(default_factory=trio.CancelScope)
    records: list[RequestRecord] = field(default_factory=list)
    num_open: int = 0
    num_open_peak: int = 0

    async def closed(
        self, arrivals: Iterator[PlannedRequest], concurrency: int, until_s: float = float("inf")
    ) -> None:
        """Run a closed loop: keep `concurrency` requests open, until `until_s` or the last one."""
        numbered = enumerate(arrivals)  # shared by the workers, so that each request is sent once
        async with trio.open_nursery() as nursery:
            for _ in range(concurrency):
                nursery.start_soon(self._worker, numbered, until_s)

    async def open(self, arrivals: Iterator[PlannedRequest]) -> None:
        """Run an open loop: send each request at its time, however many requests are open."""
        async with trio.open_nursery() as nursery:
            with self.stop:
                for number, arrival in enumerate(arrivals):
                    # A late request is sent at once: its lag shows that the client was too slow.
                    await trio.sleep(max(0.0, arrival.at_s - self.now_s()))
                    nursery.start_soon(self._one, number, arrival, arrival.at_s)

    async def _worker(self, numbered: "enumerate[PlannedRequest]", until_s: float) -> None:
        while not self.stop.cancel_called and self.now_s() < until_s:
            found = next(numbered, None)
            if found is None:
                return
            await self._one(*found, self.now_s())

    async def _one(self, number: int, arrival: PlannedRequest, planned_s: float) -> None:
        self.num_open += 1
        self.num_open_peak = max(self.num_open_peak, self.num_open)
        try:
            record = await self.send(number, arrival, planned_s)
        finally:
            self.num_open -= 1
        self.records.append(record)
        self.report(record)
