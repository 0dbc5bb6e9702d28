"""Data folders, batches in them, and a server of their requests that needs no graph."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from batch_calls import as_file, completion_line

from sagellm.gateway.batches.batch_record import BatchRecord
from sagellm.gateway.batches.batch_store import BatchClaim, Stores
from sagellm.gateway.batches.batch_work import BatchWork, LineReply
from sagellm.gateway.batches.file_store import FileRecord
from sagellm.gateway.metrics.meters import BatchMeters
from sagellm.gateway.settings import StorageLimits

TENANT = "alice"
DONE = LineReply(200, b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}')
BUSY = LineReply(503, b'{"error":{"code":"queue_full"}}', "queue_full", 0.0)


def stores_in(folder: Path, **limits: Any) -> Stores:
    return Stores(folder, StorageLimits(**limits))


def stored(stores: Stores, content: bytes, tenant: str = TENANT) -> FileRecord:
    """An uploaded file."""
    upload = stores.files.begin_upload(tenant, len(content))
    upload.write(content)
    return upload.commit("in.jsonl", 3600)


def new_batch(stores: Stores, lines: int | Sequence[Mapping[str, Any]] | bytes) -> BatchRecord:
    """A batch of that many completions, or of these lines."""
    if isinstance(lines, int):
        lines = [completion_line(number) for number in range(lines)]
    content = lines if isinstance(lines, bytes) else as_file(lines)
    file = stored(stores, content)
    return stores.batches.create(
        TENANT,
        endpoint="/v1/completions",
        input_file_id=file.id,
        metadata=None,
        output_life_s=None,
    )


def claimed(stores: Stores) -> BatchClaim:
    """The one open batch."""
    [claim] = stores.batches.claims([TENANT])
    return claim


def written(stores: Stores, file_id: str) -> list[Any]:
    """The lines of a file of results."""
    with stores.files.open(TENANT, file_id) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def full_disk(*_: object) -> None:
    """Fail like a function of the system that finds the disk full."""
    raise OSError(errno.ENOSPC, "full")


@dataclass
class ScriptedServer:
    """Answers requests with `reply(body)`; None: never. `asked`: the bodies, in their order."""

    reply: Callable[[Any], LineReply | None] = lambda body: DONE
    is_draining: bool = False
    max_body_bytes: int = 1 << 20
    num_open: int = 0
    most_open: int = 0
    asked: list[Any] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)

    @property
    def is_too_late(self) -> bool:
        return False

    @contextmanager
    def open_call(self) -> Iterator[None]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            yield
        finally:
            self.num_open -= 1

    async def answer(self, endpoint: str, body: bytes, tenant: str, request_id: str) -> LineReply:
        asked = json.loads(body)
        self.asked.append(asked)
        self.tenants.append(tenant)
        reply = self.reply(asked)
        await anyio.lowlevel.checkpoint()
        if reply is None:
            await anyio.sleep_forever()
        assert reply is not None
        return reply


async def worked(
    stores: Stores, server: ScriptedServer, claim: BatchClaim | None = None, num_at_once: int = 4
) -> BatchRecord:
    """Work on the one open batch, until that ends."""

    @contextmanager
    def turn() -> Iterator[None]:
        yield

    async def take_turn() -> Any:
        return turn()

    with claim or claimed(stores) as taken:
        work = BatchWork(taken, stores.folder, server, BatchMeters(), take_turn, num_at_once)
        await work.run()
        return taken.record


async def until(is_right: Callable[[], bool]) -> None:
    """Wait for what threads do: they wake nobody here."""
    with anyio.fail_after(20):
        while not is_right():  # noqa: ASYNC110
            await anyio.sleep(0.001)
