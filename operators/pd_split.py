"""pd_split: sends long prompts to a prefill engine, short ones to an aggregated engine.

The length of a prompt is the number of tokens that the aggregated engine would have to compute:
what one of its replicas has in its prefix cache does not count. While no replica of the prefill
engine is up, long prompts go to the aggregated engine, too. A request that leaves says in
`num_cached_tokens` what the engine that it goes to has of its prompt.
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
    """When prefill and decode run on different engines.

    `min_uncached_tokens`: the fewest prompt tokens to compute; 0: every request is split.
    `min_prompt_ratio`: if given, also the fewest prompt tokens for each token of `max_tokens`
    (names of the published API: prefilling_threshold_input_tokens, prefilling_threshold_ratio).
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
)


def is_disaggregated(request: Request, options: PDSplitOptions) -> bool:
    """llm-d's decider (disaggregate iff input - hit tokens >= threshold), and the ratio option."""
    if request.num_uncached_tokens < options.min_uncached_tokens:
        return False
    ratio = options.min_prompt_ratio
    num_prompt_tokens = len(request.prompt_token_ids)
    return ratio is None or num_prompt_tokens >= ratio * request.sampling.max_tokens


class PDSplitState(msgspec.Struct, frozen=True):
    """The state: (node, replica) of prefill engines that are down, and each engine's replicas.

    `is_prefill_down`: some prefill operator has no replica up. `indexes`: the prefix blocks of
    engines.
    """

    down: frozenset[tuple[str, int]] = frozenset()
    num_replicas: Mapping[str, int] = {}
    is_prefill_down: bool = False
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class PDSplit:
    """`prefill_targets`: the operators of engines that only the outlet `disaggregated` leads to.
    `lookups`: by outlet, what the engines that requests enter there have cached.
    """

    options: PDSplitOptions
    prefill_targets: tuple[Target, ...] = ()
    lookups: Mapping[str, PrefixLookup] = field(default_factory=dict)

    @property
    def subscribes(self) -> frozenset[str]:
        """Feedback on prefix blocks is needed only where they can change a decision."""
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
        """The request with the number of its tokens cached in the engines after that outlet."""
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
    # An engine that the other outlet leads to as well (decode's) is lost for both ways alike.
    shared = {target.engine for target in setup.targets if target.outlets != only}
    prefill_targets = tuple(
        target for target in setup.targets if target.outlets == only and target.engine not in shared
    )
    lookups = {port.name: PrefixLookup.of(setup, port.name) for port in SPEC.outlets}
    return PDSplit(options, prefill_targets, lookups)
