"""The engine that embeds: batches by tokens, order, cancelled texts, and failed batches."""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sagellm.backends.text_batches import TextBatch
from sagellm.runtime.engine.embedding_engine import (
    EmbeddingEngine,
    EmbeddingResources,
    check_text,
    shortened,
)
from sagellm.runtime.engine.output import MAX_BATCHES
from sagellm.runtime.messages import SequenceState, TokenEvent
from sagellm.runtime.port import EngineFacts, EngineRefusal

FACTS = EngineFacts("m", 100, 64, frozenset({"embed"}), vector_len=4)


@dataclass
class Device:
    """Computes a batch when the test says so: a vector begins with the first token of its text."""

    batches: list[TextBatch] = field(default_factory=list)
    tickets: list[Future] = field(default_factory=list)
    is_closed: bool = False

    def open_embedding_queue(self, threads: int | None = None) -> "Device":
        return self

    def embed(self, program: object, batch: TextBatch) -> Future:
        self.batches.append(batch)
        self.tickets.append(Future())
        return self.tickets[-1]

    def close(self) -> None:
        self.is_closed = True

    async def finish(self, *, error: Exception | None = None, number: float = 1.0) -> None:
        """Let the latest batch end."""
        batch, ticket = self.batches[-1], self.tickets[-1]
        if error is not None:
            ticket.set_exception(error)
        else:
            rows = [[text[0], number, 0, 0] for text in batch.sequences]
            ticket.set_result(np.array(rows, dtype=np.float32))
        await wait_all_tasks_blocked()

    @property
    def sizes(self) -> list[list[int]]:
        """The lengths of the texts of each batch."""
        return [[len(text) for text in batch.sequences] for batch in self.batches]


@dataclass
class Running:
    engine: EmbeddingEngine
    device: Device
    events: list[TokenEvent] = field(default_factory=list)

    async def submit(self, *lengths: int, first: int = 0, **fields: Any) -> None:
        """Submit a text of each length; the request id is the number of the text."""
        for number, length in enumerate(lengths, first):
            await self.engine.submit(text(number, length, **fields))
        await wait_all_tasks_blocked()

    async def read(self, owner: str = "op") -> None:
        async for batch in self.engine.events(owner):
            self.events += batch

    @property
    def ended(self) -> dict[str, Any]:
        return {event.request_id: event.finish_reason for event in self.events}


def text(number: int, length: int = 3, **fields: Any) -> SequenceState:
    known = {"owner": "op", "task": "embed", "request_id": str(number), **fields}
    return SequenceState(prompt_token_ids=(number, *[1] * (length - 1)), **known)


@asynccontextmanager
async def running(room: int = 10, *, is_read: bool = True) -> AsyncIterator[Running]:
    device = Device()
    engine = EmbeddingEngine(EmbeddingResources(FACTS, device, object(), 50, room, True), name="e")
    found = Running(engine, device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        if is_read:
            nursery.start_soon(found.read)
        await wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()
    assert device.is_closed or device.tickets


def numbers(event: TokenEvent) -> list[float]:
    return np.frombuffer(event.vector, "<f4").tolist()


async def test_a_text_gets_its_vector_in_one_event() -> None:
    async with running() as one:
        await one.submit(3)
        await one.device.finish()
        (event,) = one.events
    assert (event.finish_reason, event.num_prompt_tokens, event.num_tokens) == ("stop", 3, 0)
    assert numbers(event) == [0, 1, 0, 0]
    stamps = event.stamps
    assert None not in (stamps.started_s, stamps.prefilled_s, stamps.finished_s)


async def test_texts_that_come_meanwhile_share_the_next_batch_up_to_its_tokens() -> None:
    async with running(room=10) as one:
        await one.submit(3)
        await one.submit(4, 2, 4, 5, first=1)
        assert one.device.sizes == [[3]]
        await one.device.finish()
        assert one.device.sizes == [[3], [2, 4, 4]]  # by length: equal ones are computed together
        await one.device.finish()
        assert one.device.sizes[2:] == [[5]]
        await one.device.finish()
    assert one.ended == dict.fromkeys("01234", "stop")
    assert [numbers(event)[0] for event in one.events] == [0, 2, 1, 3, 4]


async def test_a_text_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    async with running(room=10) as one:
        await one.submit(30, 2)
        await one.device.finish()
        await one.device.finish()
    assert one.device.sizes == [[30], [2]]


async def test_urgent_texts_come_first() -> None:
    async with running(room=3) as one:
        await one.submit(3)
        await one.submit(3, first=1, priority=4)
        await one.submit(3, first=2, priority=0)
        for _ in range(3):
            await one.device.finish()
    assert list(one.ended) == ["0", "2", "1"]


async def test_a_cancelled_text_ends_at_once_and_is_not_computed() -> None:
    async with running() as one:
        await one.submit(3, 3)
        one.engine.cancel("0", 0, 0)
        one.engine.cancel("0", 0, 0)
        await one.submit(3, first=2)
        one.engine.cancel("2", 0, 0)
        await wait_all_tasks_blocked()
        assert one.ended == {"0": "cancelled", "2": "cancelled"}
        await one.device.finish()
    assert one.device.sizes == [[3], [3]] or one.device.sizes == [[3, 3]]
    assert [event.request_id for event in one.events].count("0") == 1


async def test_a_failed_batch_ends_its_texts_and_the_engine_goes_on() -> None:
    async with running() as one:
        await one.submit(3)
        await one.device.finish(error=RuntimeError("broken"))
        (event,) = one.events
        assert (event.finish_reason, event.code) == ("failed", "engine_failed")
        await one.submit(3, first=1)
        await one.device.finish()
    assert one.ended == {"0": "failed", "1": "stop"}


async def test_a_vector_that_is_not_finite_fails_its_text_alone() -> None:
    async with running() as one:
        await one.submit(3)
        await one.device.finish(number=float("nan"))
        (event,) = one.events
    assert (event.finish_reason, event.code, event.vector) == ("failed", "", b"")
    assert "not finite" in str(event.error)


async def test_a_reader_that_does_not_read_holds_up_only_its_own_texts() -> None:
    async with running(room=3, is_read=False) as one:
        await one.submit(*[3] * (MAX_BATCHES + 2), owner="slow")
        for _ in range(MAX_BATCHES):
            await one.device.finish()
        num_before = len(one.device.batches)
        assert one.engine.events("slow").is_full
        await one.submit(3, first=20, owner="op")
        await one.device.finish()  # of the last batch that was launched before
        assert len(one.device.batches) == num_before + 1
        await one.device.finish()
        assert not one.engine.health.is_hung
        for _ in range(2):  # one batch more than fit came before
            await one.engine.events("slow").__anext__()
        await wait_all_tasks_blocked()
        assert len(one.device.batches) == num_before + 2


async def test_load_counts_what_waits_and_what_runs() -> None:
    async with running(room=3) as one:
        await one.submit(3, 3, 3)
        load = one.engine.load
        assert (load.num_running, load.num_waiting, load.num_pending_prefill_tokens) == (1, 2, 6)
        for _ in range(3):
            await one.device.finish()
        load = one.engine.load
    assert (load.num_running, load.num_waiting, load.num_pending_prefill_tokens) == (0, 0, 0)
    assert (load.num_steps, one.engine.step_tokens.num_samples) == (3, 3)


async def test_a_stopped_engine_refuses() -> None:
    async with running() as one:
        pass
    with pytest.raises(EngineRefusal) as caught:
        await one.engine.submit(text(0))
    assert caught.value.code == "shutting_down"
    assert [batch async for batch in one.engine.events("op")] == []


async def test_a_text_may_not_run_twice() -> None:
    async with running() as one:
        await one.submit(3)
        with pytest.raises(EngineRefusal, match="runs here already"):
            await one.engine.submit(text(0))
        await one.device.finish()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 9}, "version 9"),
        ({"task": "generate"}, "embeds texts"),
        ({"adapter": "a"}, "without adapters"),
        ({"emitted_token_ids": (1,)}, "embeds texts"),
        ({"prompt_token_ids": ()}, "the text is empty"),
        ({"prompt_token_ids": (1,) * 101}, "101 tokens, and the model takes 100"),
        ({"prompt_token_ids": (50,)}, "token 50; the model knows 0 ... 49"),
        ({"prompt_token_ids": (-1,)}, "token -1"),
        ({"prompt_token_ids": (True,)}, "no token id"),
        ({"dimensions": 5}, "dimensions is 5; the model has vectors of 4"),
        ({"dimensions": 0}, "dimensions is 0"),
    ],
)
def test_what_cannot_be_embedded_is_refused(changes: dict[str, Any], says: str) -> None:
    known = {"owner": "op", "task": "embed", "request_id": "r", "prompt_token_ids": (1,)}
    with pytest.raises(EngineRefusal, match=says):
        check_text(SequenceState(**{**known, **changes}), FACTS, 50)


@pytest.mark.parametrize(
    ("vector", "dimensions", "is_unit", "expected"),
    [
        ([3, 4, 12], None, True, [3, 4, 12]),
        ([3, 4, 12], 2, True, [0.6, 0.8]),
        ([3, 4, 12], 2, False, [3, 4]),
        ([0, 0, 1], 2, True, [0, 0]),
    ],
)
def test_a_shorter_vector_is_scaled_again(
    vector: Sequence[float], dimensions: int | None, is_unit: bool, expected: Sequence[float]
) -> None:
    found = shortened(np.array(vector, dtype=np.float32), dimensions, is_unit)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected)
