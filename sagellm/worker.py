"""What a worker process of a graph runs: one replica of one engine, behind a channel."""

from dataclasses import replace

import trio

from sagellm.backends.progress import Progress
from sagellm.engines import engine_options, load_replica, prepare
from sagellm.graphs.ir import Graph
from sagellm.graphs.models import UnsupportedModel
from sagellm.logs import child_logs
from sagellm.runtime.cluster.options import processes_options
from sagellm.runtime.cluster.start import serve
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models.folder import ModelError


async def open_engine(
    graph: Graph, name: str, replica: int, num_blocks: int | None, progress: Progress
) -> LocalEngine:
    """The engine as the graph has it; with as many blocks as in an earlier life, if it had one."""
    options = engine_options(graph, name)
    if num_blocks is not None:
        options = replace(options, num_blocks=num_blocks, kv_memory=None)
    links = processes_options(graph)
    sharing = Sharing(links.kv, links.host) if links is not None else Sharing()
    return await trio.to_thread.run_sync(  # seconds
        load_replica, options, name, replica, sharing, progress
    )


def main() -> None:
    with child_logs():
        serve(open_engine, (ModelError, EngineOptionError, UnsupportedModel), prepare)


if __name__ == "__main__":
    main()
