"""Starts the engines of a graph as worker processes, under a supervisor."""

import os
from collections.abc import Callable

import trio

from sagellm.backends.progress import Progress, silent
from sagellm.engines import engine_options
from sagellm.graphs.ir import Graph
from sagellm.graphs.passes.pipeline import run_pipeline
from sagellm.graphs.passes.place import Place, replicas_of
from sagellm.graphs.passes.share_cores import ShareCores
from sagellm.logs import inherited
from sagellm.runtime.cluster.control import Control
from sagellm.runtime.cluster.launch import Processes
from sagellm.runtime.cluster.members import Workers
from sagellm.runtime.cluster.options import ProcessesOptions
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch
from sagellm.runtime.engine.options import EngineOptions

MODULE = "sagellm.worker"


async def start_workers(
    graph: Graph,
    options: ProcessesOptions,
    nursery: trio.Nursery,
    launch: Callable[[ProcessesOptions], Processes] | None = None,
    progress: Progress = silent,
) -> Supervisor:
    """Returns once every worker is ready; they run until the nursery ends. Raises WorkerUnfit,
    BadKeys.
    """
    cores = len(os.sched_getaffinity(0))
    computing = tuple(name for name in graph.engines if _computes(graph, name))
    placed = run_pipeline(graph, (ShareCores(cores, computing), Place()))
    devices = tuple(sorted({engine_options(placed, name).device for name in computing}))
    launcher = launch(options) if launch else _launcher(options, devices)
    supervisor = Supervisor(
        placed,
        replicas_of(placed),
        launcher,
        watch=Watch(options.ping_s, options.silent_s, options.hang_s),
        progress=progress,
    )
    await nursery.start(supervisor.run)
    await nursery.start(Control(Workers(supervisor), launcher.folder).run)
    return supervisor


def _computes(graph: Graph, name: str) -> bool:
    """Whether an engine computes on a device, with threads of this machine."""
    return isinstance(engine_options(graph, name), EngineOptions)


def _launcher(options: ProcessesOptions, devices: tuple[str, ...]) -> Processes:
    num_spares = options.num_spares if devices else 0
    return Processes(
        MODULE, options.address, options.keys, inherited(), num_spares=num_spares, devices=devices
    )
