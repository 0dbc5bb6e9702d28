"""A graph before servers that speak the OpenAI API, and a scripted server in this loop."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from scripted_server import Script, Server

from sagellm import Graph, ops


def graph(*urls: str, **options: Any) -> Graph:
    chain = Graph("door").engine("far", kind="openai", urls=list(urls), **options)
    chain = chain >> ops.policy_sort() >> ops.route() >> ops.generate(engine="far")
    return chain >> ops.metrics_sink()


@asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[Server]:
    server = Server(script)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()
