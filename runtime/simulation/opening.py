"""Opens modelled engines in simulated time."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from sagellm.runtime.engine.costs.spread import StepVariation
from sagellm.runtime.engine.engine_model import EngineModel
from sagellm.runtime.engine.kinds.modelled import ModelledOptions, modelled_facts
from sagellm.runtime.engine.step_cost import StepShape
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.simulation.engine import SimulatedEngine
from sagellm.runtime.simulation.links import Links
from sagellm.runtime.simulation.prompts import PromptHasher
from sagellm.runtime.simulation.timeline import SimulationError, Timeline

# A replica, the shape of the first of its consecutive steps, their number and their seconds.
OnEngineRun: TypeAlias = Callable[[EngineReplica, StepShape, int, float], None]


def open_simulated(
    options: ModelledOptions,
    place: EngineReplica,
    timeline: Timeline,
    links: Links,
    hasher: PromptHasher,
    *,
    block_len: int = 0,
    seed: int = 0,
    on_run: OnEngineRun | None = None,
) -> SimulatedEngine:
    """Open one replica. `block_len`: the tokens of a block of the trace, whose prompts may share
    blocks; 0: no prompts share any. `seed`: of step times, if the profile has a spread. `on_run` is
    called with the steps of the engine.

    Raises SimulationError for a `block_size` that the blocks of the trace do not fit, and
    EngineOptionError, ModelError, UnsupportedModel as an engine would.
    """
    facts = modelled_facts(options)
    if block_len % facts.block_size:
        raise SimulationError(
            f"engine {place.engine}: block_size: {facts.block_size} does not divide the "
            f"{block_len} tokens of a block of the trace",
            f"give a block_size that divides {block_len}",
        )
    limits, spread = options.limits, options.spread
    model = EngineModel(
        options.cost,
        limits,
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        span=block_len if limits.prefix_caching else 0,
        variation=StepVariation(spread, seed, f"{place.engine}/{place.number}") if spread else None,
    )
    if on_run is not None:
        model.on_run = partial(on_run, place)
    return SimulatedEngine(
        timeline, facts, model, place, links=links, hasher=hasher, host=options.host
    )
