"""Answering all lines of an input, a bounded number of them at a time."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import trio

from sagellm.batch.line import Ask, LineError, parse
from sagellm.batch.output import Output, failure, record
from sagellm.runtime.messages import Answer, Sampling
from sagellm.unserved import RequestFailed, RequestRefused

# Enough to keep the batches of several small engines full; more would only wait in policy_sort.
NUM_IN_FLIGHT = 64

Reply: TypeAlias = Callable[[Ask], Awaitable[Sequence[Answer]]]


@dataclass
class Tally:
    """What became of the lines so far; `ids` are those seen, as text, to refuse a second use."""

    num_answered: int = 0
    num_failed: int = 0
    num_skipped: int = 0  # answered already by the run that is resumed
    ids: dict[str, int] = field(default_factory=dict)

    @property
    def num_done(self) -> int:
        return self.num_answered + self.num_failed + self.num_skipped


@dataclass(frozen=True)
class Batch:
    """One run over an input: who replies, where to, and what lines leave unsaid.

    `report` is called with each output line after it was written, or None for a skipped one.
    """

    reply: Reply
    output: Output
    defaults: Sampling = field(default_factory=Sampling)
    given: frozenset[str] = frozenset()
    report: Callable[[dict[str, Any] | None], None] = lambda line: None
    num_in_flight: int = NUM_IN_FLIGHT
    tally: Tally = field(default_factory=Tally)

    async def serve(
        self, lines: AsyncIterator[tuple[int, bytes]], drain: trio.CancelScope | None = None
    ) -> Tally:
        """Answer every line; output lines are in order of completion.

        Cancelling `drain` stops the reading and lets what is in flight finish.
        """
        slots = trio.Semaphore(self.num_in_flight)
        async with trio.open_nursery() as nursery:
            with drain or trio.CancelScope():
                async with aclosing(lines) as reading:  # type: ignore[type-var]
                    async for number, raw in reading:
                        await slots.acquire()
                        self._start(nursery, slots, number, raw)
        return self.tally

    def _start(self, nursery: trio.Nursery, slots: trio.Semaphore, number: int, raw: bytes) -> None:
        """Begin one line; its slot is free again when it has been written."""
        try:
            ask = self._claimed(parse(number, raw, self.defaults, self.given))
        except LineError as error:
            self._write(failure(error.id, str(error), "malformed"))
            slots.release()
            return
        if str(ask.id) in self.output.answered:
            self.tally.num_skipped += 1
            self.report(None)
            slots.release()
            return
        nursery.start_soon(self._answer, ask, slots)

    def _claimed(self, ask: Ask) -> Ask:
        first = self.tally.ids.setdefault(str(ask.id), ask.number)
        if first != ask.number:
            raise LineError(ask.number, f"id {ask.id!r} is that of line {first}", ask.id)
        return ask

    async def _answer(self, ask: Ask, slots: trio.Semaphore) -> None:
        try:
            line = record(ask.id, await self.reply(ask))
        except (RequestRefused, RequestFailed) as error:
            line = failure(ask.id, str(error), str(error.end.finish_reason))
        except ValueError as error:  # refused before it entered the graph
            line = failure(ask.id, f"line {ask.number}: {error}", "refused")
        self._write(line)
        slots.release()

    def _write(self, line: dict[str, Any]) -> None:
        self.output.write(line)
        failed = "error" in line
        self.tally.num_failed += failed
        self.tally.num_answered += not failed
        self.report(line)
