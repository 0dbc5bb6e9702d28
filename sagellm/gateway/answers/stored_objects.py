"""The JSON objects of files and batches, with the field names of the OpenAI API."""

from typing import Literal

import msgspec

from sagellm.gateway.batches.batch_store import BatchRecord, BatchStatus, InputError
from sagellm.gateway.batches.file_store import FilePurpose, FileRecord


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file. Times are seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: FilePurpose
    status: Literal["processed"] = "processed"


class StoredFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A page of stored files. `last_id`: the value of `after` for the next page."""

    object: Literal["list"] = "list"
    data: list[StoredFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class RequestCounts(msgspec.Struct, frozen=True):
    """The requests of a batch: all, those answered with 200, and those with an error."""

    total: int
    completed: int
    failed: int


class InputErrors(msgspec.Struct, frozen=True):
    """What is wrong with the input of a batch that failed."""

    data: tuple[InputError, ...]
    object: Literal["list"] = "list"


class InputTokens(msgspec.Struct, frozen=True):
    """Of the prompts' tokens, those whose keys and values were there already."""

    cached_tokens: int


class OutputTokens(msgspec.Struct, frozen=True):
    """Of the answers' tokens, those that were reasoning."""

    reasoning_tokens: int


class UsageOfBatch(msgspec.Struct, frozen=True):
    """The tokens of all answers of a batch."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class StoredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are seconds since 1970; null for what has not happened."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: InputErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: UsageOfBatch | None
    metadata: dict[str, str] | None


class StoredBatches(msgspec.Struct, frozen=True, kw_only=True):
    """A page of batches, newest first. `last_id`: the value of `after` for the next page."""

    object: Literal["list"] = "list"
    data: list[StoredBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(record: FileRecord) -> StoredFile:
    """Return a file as clients see it."""
    return StoredFile(
        id=record.id,
        bytes=record.bytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


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
