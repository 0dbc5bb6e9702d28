"""Waiting for what other processes and threads do: they wake nobody here."""

from collections.abc import Callable

import trio


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> float:
    """Wait until `condition()` is true. Returns how many seconds that took.

    Raises trio.TooSlowError after `within_s`.
    """
    began_s = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)
    return trio.current_time() - began_s
