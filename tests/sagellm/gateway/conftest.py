"""Both loops: a test that takes `run` gives it a coroutine function, once under each of them."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    def run_on(function: Callable[[], Awaitable[Any]]) -> Any:
        return anyio.run(function, backend=request.param)

    return run_on
