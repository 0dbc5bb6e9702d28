"""pd_split: sends long prompts to a prefill engine of their own, short ones to a joint engine.

Long is what the joint engine would have to compute: without what one of its replicas has in its
prefix cache. While no replica of the prefill engine is up, long prompts go to the joint engine,
too. A request that leaves says in `num_cached_tokens` what is cached on the way that it goes.
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
    """When prefill and decode part.

    `min_uncached_tokens`: that many prompt tokens must be computed, at least; 0 parts always.
    `min_prompt_ratio`: if given, also that many prompt tokens for each token of `max_tokens`
    (names of the published API: prefilling_threshold_input_tokens, prefilling_threshold_ratio).
    """

    min_uncached_tokens: int = field(default=32, metadata={"min": 0})
    min_prompt_ratio: float | None = field(default=None, metadata={"min": 0.0})


SPEC = OpSpec(
    "pd_split",
    (Port("in", REQUEST),),
    (Port("disaggregated", REQUEST), Port("aggregated", REQUEST)),
    options=PDSplitOptions,
    subscribes=frozenset({"cache", "health", "topology"}),
    signals=frozenset(),
)


def is_disaggregated(request: Request, options: PDSplitOptions) -> bool:
    """llm-d's decider (disaggregate iff input - hit tokens >= threshold), and the ratio's."""
    if request.num_uncached_tokens < options.min_uncached_tokens:
        return False
    ratio = options.min_prompt_ratio
    num_prompt_tokens = len(request.prompt_token_ids)
    return ratio is None or num_prompt_tokens >= ratio * request.sampling.max_tokens


class PDSplitState(msgspec.Struct, frozen=True):
    """The state: the replicas of prefill that are down, and how many there are of each engine.

    `is_cut`: no replica of some prefill operator is up. `indexes`: the prefix blocks of engines.
    """

    down: frozenset[tuple[str, int]] = frozenset()
    num_replicas: Mapping[str, int] = {}
    is_cut: bool = False
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class PDSplit:
    """`apart`: the operators of engines that only the outlet `disaggregated` leads to. `ways`: the
    engines that requests enter by each outlet.
    """

    options: PDSplitOptions
    apart: tuple[Target, ...] = ()
    ways: Mapping[str, PrefixLookup] = field(default_factory=dict)

    @property
    def subscribes(self) -> frozenset[str]:
        """Where all requests part, or no engine is joint, nothing depends on prefix blocks."""
        joint = self.ways.get("joint")
        is_asked = self.options.min_uncached_tokens > 0 and joint is not None and joint.engines
        return SPEC.subscribes if is_asked else SPEC.subscribes - {"cache"}

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
                if all(target.node != node for target in self.apart):
                    return Step(state)
                changed = frozenset({(node, replica)})
                down = state.down - changed if is_up else state.down | changed
                return Step(self._seen(state, down, state.num_replicas))
            case Topology(num_replicas=num_replicas):
                return Step(self._seen(state, state.down, num_replicas))
        return Step(state)

    def _sent(self, state: PDSplitState, request: Request) -> Emit:
        joint = self._on_way("joint", state, request)
        if state.is_cut or not is_disaggregated(joint, self.options):
            return Emit(joint, "joint")
        return Emit(self._on_way("disaggregated", state, request), "disaggregated")

    def _on_way(self, outlet: str, state: PDSplitState, request: Request) -> Request:
        """The request, with what is cached where that outlet leads to."""
        lookup = self.ways.get(outlet)
        if not state.indexes or lookup is None:
            return request
        return lookup.looked_up(request, state.indexes)

    def _seen(
        self, state: PDSplitState, down: frozenset[tuple[str, int]], num_replicas: Mapping[str, int]
    ) -> PDSplitState:
        is_cut = False
        for target in self.apart:
            count = num_replicas.get(target.engine, target.num_replicas)
            is_cut = is_cut or sum(node == target.node for node, _ in down) >= count
        return PDSplitState(down, num_replicas, is_cut, state.indexes)


def build(options: PDSplitOptions, setup: Setup) -> PDSplit:
    only = frozenset({"disaggregated"})
    joint = {one.engine for one in setup.targets if one.outlets != only}
    apart = (one for one in setup.targets if one.outlets == only and one.engine not in joint)
    ways = {port.name: PrefixLookup.of(setup, port.name) for port in SPEC.outlets}
    return PDSplit(options, tuple(apart), ways)
