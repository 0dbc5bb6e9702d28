"""The main module of a worker process, which serves one replica of one engine over a channel.

Workers must start fast, so this module imports neither sessions nor the supervisor.
"""

from sagellm.backends.interface import Progress
from sagellm.graphs.ir import Graph
from sagellm.graphs.models import UnsupportedModel
from sagellm.logs import child_logs
from sagellm.opening.graph_engines import open_replica
from sagellm.runtime.cluster.executor_options import processes_options
from sagellm.runtime.cluster.worker_main import serve
from sagellm.runtime.engine.kinds import ReplicaPlace
from sagellm.runtime.engine.kinds.local import prepare
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models.folder import ModelError
from sagellm.runtime.port import Engine
from sagellm.runtime.registry import BrokenEntryPoint


async def open_engine(
    graph: Graph, name: str, replica: int, num_blocks: int | None, progress: Progress
) -> Engine:
    """Open one replica. `num_blocks`: its pool size before a restart, None for the first start."""
    links = processes_options(graph)
    sharing = Sharing(links.kv, links.host) if links is not None else Sharing()
    return await open_replica(graph, ReplicaPlace(name, replica, sharing, num_blocks, progress))


def main() -> None:
    with child_logs():  # the level and format of the process that started this worker
        unfit = (ModelError, EngineOptionError, UnsupportedModel, BrokenEntryPoint)
        serve(open_engine, unfit, prepare)


if __name__ == "__main__":
    main()
