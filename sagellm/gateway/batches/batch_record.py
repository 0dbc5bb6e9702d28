"""The record of a batch, as it is on the disk and as clients see it."""

import time
from math import inf
from typing import Literal, TypeAlias

import msgspec

from sagellm.gateway.answers.stored_objects import (
    BatchStatus,
    InputError,
    InputErrors,
    InputTokens,
    OutputTokens,
    RequestCounts,
    StoredBatch,
    UsageOfBatch,
)

BatchEnd: TypeAlias = Literal["failed", "completed", "expired", "cancelled"]

ENDED: frozenset[str] = frozenset({"failed", "completed", "expired", "cancelled"})
WINDOW_S = 86_400


class BatchTokens(msgspec.Struct, frozen=True):
    """The tokens of all answers of a batch."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, as its record on the disk says. Times are seconds since 1970.

    `output_id` and `error_id` are the ids of the result files, chosen at the beginning, so that a
    finish that is repeated after a crash makes no second file. `end`: how the batch ends, once that
    is decided; `times` has the time of each status.
    """

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_at: int
    output_id: str
    error_id: str
    status: BatchStatus = "validating"
    end: BatchEnd | None = None
    times: dict[str, int] = {}
    metadata: dict[str, str] | None = None
    output_life_s: int | None = None
    errors: tuple[InputError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    tokens: BatchTokens = BatchTokens()

    @property
    def expires_at(self) -> int:
        return self.created_at + WINDOW_S

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def ended_at(self) -> float:
        """The time at which the batch ended; infinity before that."""
        return self.times[self.status] if self.has_ended else inf

    def at(self, status: BatchStatus) -> "BatchRecord":
        """Return the record with another status, and the time of the change."""
        times = {**self.times, status: int(time.time())}
        return msgspec.structs.replace(self, status=status, times=times)


def batch_object(record: BatchRecord) -> StoredBatch:
    """Return a batch as clients see it. Its files are named once it has ended."""
    has_ended = record.has_ended
    at = record.times.get
    return StoredBatch(
        id=record.id,
        endpoint=record.endpoint,
        errors=InputErrors(record.errors) if record.errors else None,
        input_file_id=record.input_file_id,
        status=record.status,
        output_file_id=(record.output_id or None) if has_ended else None,
        error_file_id=(record.error_id or None) if has_ended else None,
        created_at=record.created_at,
        in_progress_at=at("in_progress"),
        expires_at=record.expires_at,
        finalizing_at=at("finalizing"),
        completed_at=at("completed"),
        failed_at=at("failed"),
        expired_at=at("expired"),
        cancelling_at=at("cancelling"),
        cancelled_at=at("cancelled"),
        request_counts=RequestCounts(record.total, record.completed, record.failed),
        usage=_usage(record) if has_ended else None,
        metadata=record.metadata,
    )


def _usage(record: BatchRecord) -> UsageOfBatch:
    tokens = record.tokens
    return UsageOfBatch(
        input_tokens=tokens.input,
        input_tokens_details=InputTokens(tokens.cached),
        output_tokens=tokens.output,
        output_tokens_details=OutputTokens(tokens.reasoning),
        total_tokens=tokens.input + tokens.output,
    )
