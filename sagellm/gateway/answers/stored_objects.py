"""The JSON objects of files and batches, with the field names of the OpenAI API."""

from typing import Literal, TypeAlias

import msgspec

FilePurpose: TypeAlias = Literal["batch", "batch_output"]
BatchStatus: TypeAlias = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


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


class InputError(msgspec.Struct, frozen=True, kw_only=True):
    """A mistake in the input of a batch. `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class InputErrors(msgspec.Struct, frozen=True):
    """The mistakes in the input of a batch that failed."""

    data: tuple[InputError, ...]
    object: Literal["list"] = "list"


class InputTokens(msgspec.Struct, frozen=True):
    """The tokens of the prompts whose keys and values were there already."""

    cached_tokens: int


class OutputTokens(msgspec.Struct, frozen=True):
    """The tokens of the answers that were reasoning."""

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
