"""The work on one batch: its input is checked, its requests are answered, its results are kept."""

import os
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Protocol

import anyio
import anyio.abc
import msgspec

from sagellm.gateway.answers.stored_objects import InputError
from sagellm.gateway.batches.batch_record import BatchEnd, BatchRecord
from sagellm.gateway.batches.batch_store import BatchClaim
from sagellm.gateway.batches.data_folder import DataFolder
from sagellm.gateway.batches.input_lines import InputScan, read_input, scan_input
from sagellm.gateway.batches.results import (
    LineResponse,
    ResultFiles,
    ResultLine,
    Tally,
    publish,
    published,
    unanswered,
)
from sagellm.gateway.metrics.meters import BatchMeters
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

LOOK_S = 0.5  # interval of looks for a cancel, the expiry and a drain
SAVE_S = 2.0  # interval of saved counts
LATE_S = 0.2  # pause before the next request while the app's loop is too late for calls
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
_BUSY = (429, 503)  # refusals that say: try again
_ABORT = "abort"  # but not that an operator has ended the request
_CHUNK = 256  # lines without an answer that are appended at once


@dataclass(frozen=True, slots=True)
class LineReply:
    """The reply that a client of HTTP would have got for one request. `body` is JSON text."""

    status: int
    body: bytes
    code: str | None = None
    retry_after_s: float | None = None

    @property
    def is_refused_for_now(self) -> bool:
        return self.status in _BUSY and self.code != _ABORT


class RequestServer(Protocol):
    """The app, as the work on batches needs it. Used on the app's loop."""

    @property
    def is_draining(self) -> bool: ...

    @property
    def is_too_late(self) -> bool:
        """Whether the loop is so late that calls are refused."""
        ...

    @property
    def max_body_bytes(self) -> int: ...

    def open_call(self) -> AbstractContextManager[None]:
        """Count one call as open during the `with` block: a drain waits for it."""

    async def answer(self, endpoint: str, body: bytes, tenant: str, request_id: str) -> LineReply:
        """Answer one request of a batch at the lowest priority, in the tenant's name."""


# Enters when a request of the tenant may run.
TakeTurn = Callable[[], Awaitable[AbstractContextManager[None]]]


class ResultWriter:
    """Appends results in a thread. Results that come meanwhile are appended together."""

    def __init__(self, folder: DataFolder, results: ResultFiles) -> None:
        self._folder = folder
        self._results = results
        self._waiting: list[ResultLine] = []
        self._is_stored = anyio.Event()
        self._has_come = anyio.Event()

    async def put(self, line: ResultLine) -> None:
        """Append a result, and wait until it is on the disk."""
        self._waiting.append(line)
        is_stored = self._is_stored
        self._has_come.set()
        await is_stored.wait()

    async def run(self) -> None:
        """Append results until cancelled. Raises OSError."""
        while True:
            await self._has_come.wait()
            self._has_come = anyio.Event()
            lines, self._waiting = self._waiting, []
            is_stored, self._is_stored = self._is_stored, anyio.Event()
            await self._folder.run(self._results.append, lines)
            is_stored.set()


class BatchWork:
    """The work on one claimed batch, on the app's loop, until the batch ends or a drain.

    `num_at_once`: how many requests of the batch may wait for their turn or run.
    """

    def __init__(
        self,
        claim: BatchClaim,
        folder: DataFolder,
        server: RequestServer,
        meters: BatchMeters,
        take_turn: TakeTurn,
        num_at_once: int,
    ) -> None:
        self._claim = claim
        self._folder = folder
        self._server = server
        self._meters = meters
        self._take_turn = take_turn
        self._num_at_once = num_at_once
        self._results = ResultFiles(claim)
        self._stop = anyio.Event()  # no further request begins
        self._end: BatchEnd | None = None  # why it stops; None: for a drain
        self._saved_s = 0.0

    async def run(self) -> None:
        """Work until the batch has ended, or until the server drains. Raises OSError."""
        if self._claim.record.end is None:
            self._end = await self._decide()
            if self._end is None:
                return
            await self._folder.run(self._settle, self._end)
        await self._folder.run(self._finish)
        self._meters.ended(self._claim.record.status)
        LOG.info("batch_ended", **self._fields, status=self._claim.record.status)

    async def _decide(self) -> BatchEnd | None:
        """Answer the requests without a result. Return how the batch ends; None for a drain."""
        with closing(self._results):
            scan = await self._folder.run(self._scan)
            if self._claim.record.end is not None:  # the input is wrong
                return self._claim.record.end
            LOG.info("batch_begun", **self._fields, num_pending=len(scan.pending))
            await self._serve(scan)
            return self._end

    def _scan(self) -> InputScan:
        """Check the input, and read the results of earlier processes. Saves the record."""
        record, tally = self._claim.record, self._results.open()
        scan = self._pending(tally)
        if scan.errors:  # of a new batch; or a limit became lower since the batch began
            failed = msgspec.structs.replace(record, errors=tuple(scan.errors), end="failed")
            self._claim.save(failed)
        elif record.status == "validating":
            self._claim.save(msgspec.structs.replace(record.at("in_progress"), total=scan.total))
        return scan

    def _pending(self, tally: Tally) -> InputScan:
        return scan_input(
            self._claim.path("input"),
            self._claim.record.endpoint,
            max_lines=self._folder.limits.num_batch_requests,
            max_body_bytes=self._server.max_body_bytes,
            done=tally.done,
        )

    async def _serve(self, scan: InputScan) -> None:
        """Answer the pending requests, until all have a result or something stops the work."""
        places = anyio.Semaphore(self._num_at_once)
        writer = ResultWriter(self._folder, self._results)
        async with anyio.create_task_group() as helpers:
            helpers.start_soon(writer.run)
            async with anyio.create_task_group() as requests:
                helpers.start_soon(self._watch, requests.cancel_scope)
                for offset in scan.pending:
                    await places.acquire()
                    if self._stop.is_set():
                        break
                    requests.start_soon(self._request, offset, writer, places)
            if not self._stop.is_set():
                self._end = "completed"
            helpers.cancel_scope.cancel()

    async def _watch(self, requests: anyio.CancelScope) -> None:
        """Stop the work at a drain; at a cancel, the expiry or a full disk end running requests."""
        while True:
            end = await self._folder.run(self._look)
            if end is not None:
                self._end = end
                self._stop.set()
                requests.cancel()
                return
            if self._server.is_draining:
                self._stop.set()
            await anyio.sleep(LOOK_S)

    def _look(self) -> BatchEnd | None:
        """Return why the batch ends before all requests have a result; None if it goes on."""
        if self._claim.is_cancelled:
            return "cancelled"
        if time.time() >= self._claim.record.expires_at:
            return "expired"
        if time.monotonic() - self._saved_s < SAVE_S:
            return None
        self._saved_s = time.monotonic()
        if not self._folder.has_room(self._claim.own):
            message = "the results exceed the bytes that this key, or all keys, may store"
            error = InputError(code="storage_limit_exceeded", message=message)
            self._claim.save(msgspec.structs.replace(self._claim.record, errors=(error,)))
            return "failed"
        self._save_counts()
        return None

    def _save_counts(self) -> None:
        record, results = self._claim.record, self._results
        if (record.completed, record.failed) != (results.completed, results.failed):
            counts = {"completed": results.completed, "failed": results.failed}
            self._claim.save(msgspec.structs.replace(record, **counts))

    # ---- one request -------------------------------------------------------------------------

    async def _request(self, offset: int, writer: ResultWriter, places: anyio.Semaphore) -> None:
        """Answer one request, and again after each refusal for overload, until it has a result."""
        delay_s = FIRST_RETRY_S
        try:
            while not self._stop.is_set():
                reply = await self._attempt(offset, writer)
                if reply is None:
                    return
                self._meters.retried()
                wait_s = max(delay_s, reply.retry_after_s or 0.0) * random.uniform(0.75, 1.25)
                delay_s = min(2 * delay_s, LONGEST_RETRY_S)
                with anyio.move_on_after(wait_s):
                    await self._stop.wait()
        finally:
            places.release()

    async def _attempt(self, offset: int, writer: ResultWriter) -> LineReply | None:
        """Answer one request in its turn, and store the result.

        Return None if the request has a result, or if the work stops; else the refusal.
        """
        with await self._take_turn():
            # Polled: the lag of a loop changes without an event.
            while self._server.is_too_late and not self._stop.is_set():  # noqa: ASYNC110
                await anyio.sleep(LATE_S)
            if self._server.is_draining:
                self._stop.set()
            if self._stop.is_set():
                return None
            with self._server.open_call():  # a drain waits until the result is stored
                line = await self._folder.run(read_input, self._claim.path("input"), offset)
                record, request_id = self._claim.record, os.urandom(16).hex()
                reply = await self._server.answer(
                    record.endpoint, line.body, record.tenant, request_id
                )
                if reply.is_refused_for_now:
                    return reply
                response = LineResponse(reply.status, request_id, msgspec.Raw(reply.body))
                result = ResultLine(
                    id=f"batch_req_{request_id}", custom_id=line.custom_id, response=response
                )
                await writer.put(result)
                self._meters.answered(is_ok=result.is_answer)
                return None

    # ---- the end -----------------------------------------------------------------------------

    def _settle(self, end: BatchEnd) -> None:
        """Save how the batch ends. Requests of an expired batch without a result get an error."""
        with closing(self._results):
            tally = self._results.open()
            if end == "expired":
                self._expire_rest(tally)
            counts = {"completed": self._results.completed, "failed": self._results.failed}
        record = self._claim.record.at("cancelling" if end == "cancelled" else "finalizing")
        self._claim.save(msgspec.structs.replace(record, end=end, tokens=tally.tokens, **counts))

    def _expire_rest(self, tally: Tally) -> None:
        message = "the request was not answered before the completion window of its batch ended"
        path, offsets = self._claim.path("input"), self._pending(tally).pending
        for start in range(0, len(offsets), _CHUNK):
            names = [read_input(path, each).custom_id for each in offsets[start : start + _CHUNK]]
            self._results.append(unanswered("batch_expired", message, names))

    def _finish(self) -> None:
        """Publish the results, and end the batch. May be repeated after a crash."""
        end = self._claim.record.end
        assert end is not None
        publish(self._claim)
        has_output, has_errors = published(self._claim)
        record = self._claim.record
        self._claim.save(
            msgspec.structs.replace(
                record.at(end),
                output_id=record.output_id if has_output else "",
                error_id=record.error_id if has_errors else "",
            )
        )
        self._claim.close()

    @property
    def _fields(self) -> dict[str, object]:
        record: BatchRecord = self._claim.record
        return {"batch": record.id, "tenant": record.tenant, "num_requests": record.total}
