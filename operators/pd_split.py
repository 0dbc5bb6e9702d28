"""pd_split: sends long prompts to a prefill engine, and short prompts to an aggregated engine.

The length of a prompt is the number of tokens that the aggregated engine would have to compute: a
prefix that one of its replicas has cached does not count. While the prefill engine has no replica
up, long prompts go to the aggregated engine, too. `num_cached_tokens` of an emitted request is the
number of its prompt tokens that the chosen engine has cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.feedback import HealthChanged, PrefixesChanged, Topology
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Step, Target
from sagellm.runtime.prefixes import PrefixIndex, PrefixLookup


@dataclass(frozen=True, slots=True)
class PDSplitOptions:
    """The thresholds of a request that is disaggregated: prefill and decode run on different
    engines.

    `min_uncached_tokens`: the request has at least this number of uncached prompt tokens; 0: every
    request is disaggregated. `min_prompt_ratio`: the request has in addition at least this number
    of prompt tokens per token of `max_tokens`; None: no such condition. The published API names
    them prefilling_threshold_input_tokens and prefilling_threshold_ratio.
    """

    min_uncached_tokens: int = field(default=32, metadata={"min": 0})
    min_prompt_ratio: float | None = field(default=None, metadata={"min": 0.0})


DISAGGREGATED, AGGREGATED = "disaggregated", "aggregated"  # the outlets
SPEC = OpSpec(
    "pd_split",
    (Port("in", REQUEST),),
    (Port(DISAGGREGATED, REQUEST), Port(AGGREGATED, REQUEST, aliases=("joint",))),
    options=PDSplitOptions,
    subscribes=frozenset({"cache", "health", "topology"}),
    signals=frozenset(),
    decides="split",
)


def is_disaggregated(request: Request, options: PDSplitOptions) -> bool:
    """Whether a request meets both thresholds.

    Source: llm-d's decider (disaggregate iff input - hit tokens >= threshold), plus the ratio.
    """
    if request.num_uncached_tokens < options.min_uncached_tokens:
        return False
    ratio = options.min_prompt_ratio
    num_prompt_tokens = len(request.prompt_token_ids)
    return ratio is None or num_prompt_tokens >= ratio * request.sampling.max_tokens


class PDSplitState(msgspec.Struct, frozen=True):
    """The state of the operator. `down`: prefill replicas that are down, as (operator, replica).
    `num_replicas`: by engine.

    `is_prefill_down`: a prefill operator has no replica up. `indexes`: the prefix blocks of each
    engine.
    """

    down: frozenset[tuple[str, int]] = frozenset()
    num_replicas: Mapping[str, int] = {}
    is_prefill_down: bool = False
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class PDSplit:
    """Emits each request at the outlet `disaggregated` or `aggregated`.

    `prefill_targets`: the operators whose engines only the outlet `disaggregated` leads to.
    `lookups`: by outlet, finds the prompt tokens that the first engines after the outlet have
    cached.
    """

    options: PDSplitOptions
    prefill_targets: tuple[Target, ...] = ()
    lookups: Mapping[str, PrefixLookup] = field(default_factory=dict)

    @property
    def subscribes(self) -> frozenset[str]:
        """The feedback to subscribe to: prefix blocks ("cache") only if they can change a
        decision.
        """
        lookup = self.lookups.get(AGGREGATED)
        is_needed = self.options.min_uncached_tokens > 0 and lookup is not None and lookup.engines
        return SPEC.subscribes if is_needed else SPEC.subscribes - {"cache"}

    @property
    def initial(self) -> PDSplitState:
        return PDSplitState()

    def on(
        self, state: PDSplitState, happened: Input, now: float, draw: Draw
    ) -> Step[PDSplitState]:
        match happened:
            case Arrival(item=Request() as request):
                return Step(state, (self._sent(state, request),))
            case PrefixesChanged(engine=engine, index=index):
                indexes = {**state.indexes, engine: index}
                return Step(msgspec.structs.replace(state, indexes=indexes))
            case HealthChanged(node=node, replica=replica, is_up=is_up):
                if all(target.node != node for target in self.prefill_targets):
                    return Step(state)
                changed = frozenset({(node, replica)})
                down = state.down - changed if is_up else state.down | changed
                return Step(self._after_change(state, down, state.num_replicas))
            case Topology(num_replicas=num_replicas):
                return Step(self._after_change(state, state.down, num_replicas))
        return Step(state)

    def _sent(self, state: PDSplitState, request: Request) -> Emit:
        aggregated = self._looked_up(AGGREGATED, state, request)
        if state.is_prefill_down or not is_disaggregated(aggregated, self.options):
            return Emit(aggregated, AGGREGATED)
        return Emit(self._looked_up(DISAGGREGATED, state, request), DISAGGREGATED)

    def _looked_up(self, outlet: str, state: PDSplitState, request: Request) -> Request:
        """The request with `num_cached_tokens` of the engines after `outlet`."""
        lookup = self.lookups.get(outlet)
        if not state.indexes or lookup is None:
            return request
        return lookup.looked_up(request, state.indexes)

    def _after_change(
        self, state: PDSplitState, down: frozenset[tuple[str, int]], num_replicas: Mapping[str, int]
    ) -> PDSplitState:
        """The state after a replica went up or down, or the number of replicas changed."""
        is_prefill_down = False
        for target in self.prefill_targets:
            count = num_replicas.get(target.engine, target.num_replicas)
            num_down = sum(node == target.node for node, _ in down)
            is_prefill_down = is_prefill_down or num_down >= count
        return PDSplitState(down, num_replicas, is_prefill_down, state.indexes)


def build(options: PDSplitOptions, setup: Setup) -> PDSplit:
    only = frozenset({DISAGGREGATED})
    # If an engine that both outlets lead to (decode's) is down, neither outlet is better.
    shared = {target.engine for target in setup.targets if target.outlets != only}
    prefill_targets = tuple(
        target for target in setup.targets if target.outlets == only and target.engine not in shared
    )
    lookups = {port.name: PrefixLookup.of(setup, port.name) for port in SPEC.outlets}
    return PDSplit(options, prefill_targets, lookups)
