"""Sends one request and writes down what comes back."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from sagellm.client.answers import Body, Choice, StreamReader
from sagellm.client.asking import CHAT, COMPLETIONS, encode, is_stream, not_streamed
from sagellm.client.body import BodyBytes
from sagellm.client.failure import TIMED_OUT, ClientError
from sagellm.client.server_async import AsyncServer
from sagellm.load.prompts import Prompts
from sagellm.load.record import REFUSALS, Record
from sagellm.load.trace import Arrival

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0  # before another attempt, where the server names no time


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked, and how long and how often."""

    model: str
    is_chat: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    num_retries: int = 0
    timeout_s: float = 600.0
    seed: int = 0


class Sender:
    """Sends requests of one load to one server. Begin it when the load begins."""

    def __init__(self, server: AsyncServer, target: Target, prompts: Prompts) -> None:
        self._server = server
        self._target = target
        self._prompts = prompts
        self._draw = Random(f"{target.seed}/waits")
        self.started_s = trio.current_time()

    @property
    def now_s(self) -> float:
        return trio.current_time() - self.started_s

    async def send(self, number: int, arrival: Arrival, planned_s: float) -> Record:
        """One request with its retries. Whatever goes wrong is in the record."""
        content = self._content(number, arrival)
        lengths = arrival.input_len, arrival.output_len
        record = Record(number, planned_s, self.now_s, *lengths)
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

    def _content(self, number: int, arrival: Arrival) -> bytes:
        prompt = self._prompts.make(number, arrival.input_len, arrival.block_ids)
        if self._target.is_chat:
            call: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            call = {"prompt": prompt}
        wanted = {"max_tokens": arrival.output_len, "stream_options": {"include_usage": True}}
        return encode({**call, **wanted}, self._target.options, self._target.model, True)

    async def _attempts(self, content: bytes, record: Record) -> None:
        while True:
            try:
                return await self._attempt(content, record)
            except ClientError as error:
                if error.status not in REFUSALS or record.first_s is not None:
                    raise  # also where it says so in the middle of an answer
                record.num_refusals += 1
                if record.num_attempts > self._target.num_retries or error.should_retry is False:
                    raise
                await trio.sleep(self._wait_s(error, record.num_attempts))
                record.num_attempts += 1

    def _wait_s(self, error: ClientError, num_attempts: int) -> float:
        """As the server says; else twice as long each time, drawn so that clients spread."""
        if error.retry_after_s is not None:
            return error.retry_after_s
        longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (num_attempts - 1))
        return self._draw.uniform(0.5 * longest_s, longest_s)

    async def _attempt(self, content: bytes, record: Record) -> None:
        path = CHAT if self._target.is_chat else COMPLETIONS
        response = await self._server.send("POST", path, content)
        record.status = response.status_code
        if not is_stream(response.headers):
            raise not_streamed(await self._server.read(response))
        async with BodyBytes(response, self._server.url) as body:
            await self._stream(body, record)

    async def _stream(self, body: BodyBytes, record: Record) -> None:
        reader = StreamReader()
        while not reader.is_over:
            data = await body.next()
            now_s = self.now_s
            reader.end() if data is None else reader.feed(data)
            while (chunk := reader.next()) is not None:
                _note(chunk, record, now_s)
        record.ended_s = now_s
        await body.finish()


def error_class(error: ClientError) -> str:
    """What errors are counted by: the status of HTTP, or what became of the connection."""
    return f"http_{error.status}" if error.status is not None else error.code or "failed"


def _note(chunk: Body, record: Record, now_s: float) -> None:
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
    """A token whose text is not whole yet has an empty text; so has the chunk that only ends."""
    if choice.content is None or choice.is_opening:
        return False
    return bool(choice.content) or choice.finish_reason is None
