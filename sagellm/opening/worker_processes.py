"""Starts the engines of a graph as worker processes, under a supervisor."""

from collections.abc import Callable

import trio

from sagellm.backends.cpu.topology import usable_cores
from sagellm.backends.interface import Progress, silent
from sagellm.graphs.ir import Graph
from sagellm.graphs.passes import run_pipeline
from sagellm.graphs.passes.placement import Place, ShareCores, replicas_of
from sagellm.graphs.sections import ReplicaBounds, scaled_engines
from sagellm.logs import logs_environment
from sagellm.opening.graph_engines import engine_options
from sagellm.runtime.cluster.autoscaling import Autoscaling
from sagellm.runtime.cluster.control import ControlSocket
from sagellm.runtime.cluster.control_commands import WorkerCommands
from sagellm.runtime.cluster.executor_options import ProcessesOptions
from sagellm.runtime.cluster.launch import ProcessLauncher
from sagellm.runtime.cluster.supervisor import Supervisor
from sagellm.runtime.cluster.worker import Watch
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.executors.tasks import Shell
from sagellm.runtime.registry import read_options

WORKER_MODULE = "sagellm.opening.worker_main"


async def start_workers(
    graph: Graph,
    options: ProcessesOptions,
    nursery: trio.Nursery,
    launch: Callable[[ProcessesOptions], ProcessLauncher] | None = None,
    progress: Progress = silent,
) -> Supervisor:
    """Start a supervisor and its workers in `nursery`; return when every worker is ready.

    Cancelling the nursery ends the workers. `launch` makes the process launcher, in place of the
    default one. Raises WorkerUnfit, BadKeys.
    """
    computing = tuple(name for name in graph.engines if _computes(graph, name))
    placed = run_pipeline(graph, (ShareCores(usable_cores().threads, computing), Place()))
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
    await nursery.start(ControlSocket(WorkerCommands(supervisor), launcher.folder).run)
    return supervisor


async def allow_scaling(
    graph: Graph, supervisor: Supervisor, executor: Shell, nursery: trio.Nursery
) -> None:
    """Let the operators of a graph change how many workers its engines have."""
    bounds = {
        name: read_options(ReplicaBounds, given)
        for name, (_, given) in scaled_engines(graph).items()
    }
    autoscaling = Autoscaling(supervisor, executor, bounds)
    await nursery.start(autoscaling.run)
    executor.scale = autoscaling.begin


def _computes(graph: Graph, name: str) -> bool:
    """Whether an engine computes on a device of this machine, so that it needs cores."""
    return isinstance(engine_options(graph, name), EngineOptions)


def _launcher(options: ProcessesOptions, devices: tuple[str, ...]) -> ProcessLauncher:
    # A spare has imported the modules of the devices, which is the slow part of a start.
    num_spares = options.num_spares if devices else 0
    return ProcessLauncher(
        WORKER_MODULE,
        options.address,
        options.keys,
        logs_environment(),
        num_spares=num_spares,
        devices=devices,
    )
