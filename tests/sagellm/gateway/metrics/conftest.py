"""A graph over null engines with its meters."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import pytest
from gateway_calls import CARD

from sagellm import Graph
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.session import Session

Opened: TypeAlias = Callable[..., AbstractAsyncContextManager[tuple[Session, GatewayMeters]]]


@pytest.fixture(scope="session")
def opened() -> Opened:
    @asynccontextmanager
    async def open_metered(
        graph: str = "pd_many", compat: tuple[str, ...] = ("vllm",), **options: Any
    ) -> AsyncIterator[tuple[Session, GatewayMeters]]:
        loaded = Graph.load(graph)
        given = {
            f"{engine}.{name}": value
            for engine in loaded.ir.engines
            for name, value in {"device": "null", "num_blocks": 512, "max_model_len": 2048}.items()
        }
        async with loaded.open(set={**given, **options}) as session:
            yield (
                session,
                GatewayMeters(
                    session, models=(CARD,), endpoints=("/v1/completions",), compat=compat
                ),
            )

    return open_metered
