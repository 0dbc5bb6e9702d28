"""A call goes on for as long as its client is there."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.types import Receive

T = TypeVar("T")


async def until_gone(receive: Receive) -> None:
    """Return when the client has left. Its request was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def attended(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """What `work` returns; None where the client left first, and `work` was cancelled.

    Raises what `work` raises, as it was raised.
    """
    result: T | None = None
    failure: Exception | None = None

    async def attend() -> None:
        await until_gone(receive)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attend)
        try:
            result = await work()
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result
