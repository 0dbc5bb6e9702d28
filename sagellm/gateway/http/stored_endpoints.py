"""The endpoints of files and batches."""

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from typing import BinaryIO, TypeVar

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagellm.gateway.answers.stored_objects import (
    DeletedFile,
    StoredBatches,
    StoredFiles,
)
from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.batches.batch_record import BatchRecord, batch_object
from sagellm.gateway.batches.batch_store import Stores
from sagellm.gateway.batches.data_folder import DataFolder
from sagellm.gateway.batches.file_store import FileRecord, file_object
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.checks import read_length
from sagellm.gateway.http.endpoints import json_response
from sagellm.gateway.http.line_calls import BATCHED
from sagellm.gateway.http.uploads import UploadForm, boundary_of, read_upload
from sagellm.gateway.protocol.batch_bodies import read_batch, read_page
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

R = TypeVar("R", FileRecord, BatchRecord)

_PIECE_BYTES = 256 << 10


def _stores(gateway: Gateway) -> Stores:
    if gateway.stores is None:
        message = "this server keeps no files; its operator may start it with --data-dir FOLDER"
        raise ApiError(404, message, code="storage_off")
    return gateway.stores


async def create_file(gateway: Gateway, request: Request) -> Response:
    """Store an uploaded file. The body goes to the disk as it comes."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    boundary = boundary_of(request.headers.get("content-type", ""))
    most = stores.folder.limits.upload_bytes
    # Without a length, the largest file is reserved until the last byte.
    length = request.headers.get("content-length")
    reserved = most if length is None else int(min(read_length(length.encode()), most))
    with stores.uploading(tenant):
        upload = await stores.folder.run(stores.files.begin_upload, tenant, reserved)
        try:
            form = UploadForm(boundary, upload, most)
            fields = await read_upload(request.stream(), form, stores.folder)
            record = await stores.folder.run(upload.commit, fields.filename, fields.life_s)
        finally:
            with anyio.CancelScope(shield=True):
                await stores.folder.run(upload.discard)
    LOG.info("file_stored", file=record.id, tenant=tenant, num_bytes=record.bytes)
    return json_response(file_object(record))


async def list_files(gateway: Gateway, request: Request) -> Response:
    """Answer a page of the tenant's files."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    known = ("limit", "after", "order", "purpose")
    query = read_page(request.query_params.multi_items(), known=known, default=10_000, most=10_000)

    records = stores.files.records(tenant, after=query.after, newest_first=query.is_newest_first)
    chosen = (record for record in records if query.purpose in (None, record.purpose))
    page = await stores.folder.run(_page, chosen, query.limit, file_object, StoredFiles)
    return json_response(page)


async def retrieve_file(gateway: Gateway, request: Request) -> Response:
    stores, tenant = _stores(gateway), request.state.call.tenant
    record = await stores.folder.run(stores.files.record, tenant, request.path_params["id"])
    return json_response(file_object(record))


async def delete_file(gateway: Gateway, request: Request) -> Response:
    stores, tenant = _stores(gateway), request.state.call.tenant
    file_id = request.path_params["id"]
    await stores.folder.run(stores.files.delete, tenant, file_id)
    return json_response(DeletedFile(id=file_id))


async def file_content(gateway: Gateway, request: Request) -> "FileContent":
    """Answer the bytes of a file."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    file = await stores.folder.run(stores.files.open, tenant, request.path_params["id"])
    return FileContent(file, stores.folder)


class FileContent:
    """The response with the content of an open file, an ASGI app. It closes the file."""

    def __init__(self, file: BinaryIO, folder: DataFolder) -> None:
        self._file = file
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with closing(self._file):
            num_left = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"content-length", b"%d" % num_left),
                (b"x-content-type-options", b"nosniff"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if not num_left or scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            while num_left:
                piece = await self._folder.run(self._file.read, min(num_left, _PIECE_BYTES))
                if not piece:
                    raise OSError("the file became shorter")
                num_left -= len(piece)
                more = num_left > 0
                await send({"type": "http.response.body", "body": piece, "more_body": more})


async def create_batch(gateway: Gateway, request: Request) -> Response:
    """Store a new batch, and begin to work on it."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    endpoints = [path for path in BATCHED if path in request.scope["paths"]]
    asked = read_batch(await request.body(), gateway.settings.limits, endpoints)
    file = await stores.folder.run(stores.files.record, tenant, asked.input_file_id)
    if file.purpose != "batch":
        raise wrong("input_file_id", "is the id of a file of results; upload one for batches")
    after = asked.output_expires_after
    record = await stores.folder.run(
        stores.batches.create,
        tenant,
        endpoint=asked.endpoint,
        input_file_id=file.id,
        metadata=asked.metadata,
        output_life_s=None if after is None else after.seconds,
    )
    LOG.info("batch_created", batch=record.id, tenant=tenant, endpoint=record.endpoint)
    stores.on_batch()
    return json_response(batch_object(record))


async def list_batches(gateway: Gateway, request: Request) -> Response:
    """Answer a page of the tenant's batches, newest first."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    known = ("limit", "after")
    query = read_page(request.query_params.multi_items(), known=known, default=20, most=100)
    records = stores.batches.records(tenant, after=query.after)
    page = await stores.folder.run(_page, records, query.limit, batch_object, StoredBatches)
    return json_response(page)


async def retrieve_batch(gateway: Gateway, request: Request) -> Response:
    stores, tenant = _stores(gateway), request.state.call.tenant
    record = await stores.folder.run(stores.batches.record, tenant, request.path_params["id"])
    return json_response(batch_object(record))


async def cancel_batch(gateway: Gateway, request: Request) -> Response:
    """Ask the process that works on a batch to cancel it."""
    stores, tenant = _stores(gateway), request.state.call.tenant
    record = await stores.folder.run(stores.batches.cancel, tenant, request.path_params["id"])
    return json_response(batch_object(record))


def _page(
    records: Iterable[R],
    limit: int,
    shown: Callable[[R], msgspec.Struct],
    page: Callable[..., msgspec.Struct],
) -> msgspec.Struct:
    """Return a `page` of the first `limit` records, each as `shown`. Blocks: it reads them."""
    found = list(islice(records, limit + 1))
    data = found[:limit]
    return page(
        data=[shown(record) for record in data],
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )
