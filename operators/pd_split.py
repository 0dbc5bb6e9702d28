"""pd_split: sends a request to a prefill engine and then to a decode engine, or to an aggregated
engine.

The length of a prompt is the number of tokens that the aggregated engine would have to compute: a
prefix that one of its replicas has cached does not count. While the prefill engine has no replica
up, all prompts go to the aggregated engine. `num_cached_tokens` of an emitted request is the number
of its prompt tokens that the chosen engine has cached.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.decode_load import UpReplicas
from sagellm.runtime.feedback import (
    FirstToken,
    HealthChanged,
    KVMoved,
    LoadReported,
    PrefixesChanged,
    Topology,
)
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Signal, Step, Target
from sagellm.runtime.prefixes import PrefixIndex, PrefixLookup
from sagellm.runtime.service_limits import DECODING
from sagellm.runtime.split_gain import SideForecast, SplitForecast, SplitGain, SplitSide


@dataclass(frozen=True, slots=True)
class PDSplitOptions:
    """`strategy`: which requests are disaggregated, so that prefill and decode run on different
    engines.

        threshold  those that meet `min_uncached_tokens`, and `min_prompt_ratio` if it is given
        ratio      those that meet `min_prompt_ratio`, which is 4 if it is not given
        adaptive   those that gain more time than the transfer takes, by measurements of both ways
                   (`SplitGain`); those that `threshold` chooses, until enough was measured

    `min_uncached_tokens`: the request has at least this number of uncached prompt tokens; 0: every
    request meets it. `min_prompt_ratio`: the request has at least this number of prompt tokens per
    token of `max_tokens`. The published API names them prefilling_threshold_input_tokens and
    prefilling_threshold_ratio.

    Of `adaptive`: `answer_tokens`: the tokens of an answer that count, where `max_tokens` is not
    lower. `kv_bytes_per_s`: the bandwidth between the engines until a transfer was measured; None:
    the first transfers count as free.
    """

    strategy: Literal["threshold", "ratio", "adaptive"] = "threshold"
    min_uncached_tokens: int = field(default=32, metadata={"min": 0})
    min_prompt_ratio: float | None = field(default=None, metadata={"min": 0.0})
    answer_tokens: int = field(default=64, metadata={"min": 1})
    kv_bytes_per_s: float | None = field(default=None, metadata={"min": 1.0})


DISAGGREGATED, AGGREGATED = "disaggregated", "aggregated"  # the outlets
SPEC = OpSpec(
    "pd_split",
    (Port("in", REQUEST),),
    (Port(DISAGGREGATED, REQUEST), Port(AGGREGATED, REQUEST, aliases=("joint",))),
    options=PDSplitOptions,
    subscribes=frozenset({"cache", "first_token", "health", "load", "topology", "transfer"}),
    signals=frozenset({"forget"}),
    decides="split",
)
_MIN_RATIO = 4.0  # of `ratio` by default: prefilling_threshold_ratio of the published API


def is_disaggregated(request: Request, options: PDSplitOptions) -> bool:
    """Whether a request meets the thresholds of the strategies `threshold` and `ratio`.

    Source: llm-d's decider (disaggregate iff input - hit tokens >= threshold), plus the ratio.
    """
    ratio = options.min_prompt_ratio
    if options.strategy == "ratio":
        ratio = _MIN_RATIO if ratio is None else ratio
    elif request.num_uncached_tokens < options.min_uncached_tokens:
        return False
    num_prompt_tokens = len(request.prompt_token_ids)
    return ratio is None or num_prompt_tokens >= ratio * request.sampling.max_tokens


class PDSplitState(msgspec.Struct, frozen=True):
    """The state of the operator. `down`: prefill replicas that are down, as (operator, replica).
    `num_replicas`: by engine.

    `is_prefill_down`: a prefill operator has no replica up. `indexes`: the prefix blocks of each
    engine. `forecast`: that of `strategy: adaptive`.
    """

    down: frozenset[tuple[str, int]] = frozenset()
    num_replicas: Mapping[str, int] = {}
    is_prefill_down: bool = False
    indexes: Mapping[str, PrefixIndex] = {}
    forecast: SplitForecast | None = None


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
    gain: SplitGain | None = None
    targets: tuple[Target, ...] = ()

    @property
    def subscribes(self) -> frozenset[str]:
        """The feedback to subscribe to: prefix blocks ("cache") only if they can change a
        decision, and measurements only for `strategy: adaptive`.
        """
        wanted, lookup = {"health", "topology"}, self.lookups.get(AGGREGATED)
        counts = self.options.min_uncached_tokens > 0 and self.options.strategy != "ratio"
        if (counts or self.gain is not None) and lookup is not None and lookup.engines:
            wanted.add("cache")
        if self.gain is not None:
            wanted |= {"first_token", "load", "transfer"}
        return frozenset(wanted)

    @property
    def initial(self) -> PDSplitState:
        if self.gain is None:
            return PDSplitState()
        return PDSplitState(forecast=SplitForecast(dict.fromkeys(self.gain.sides, SideForecast())))

    def keeps(self, state: PDSplitState, request_id: str) -> bool:
        return state.forecast is not None and request_id in state.forecast.pending

    def on(
        self, state: PDSplitState, happened: Input, now: float, draw: Draw
    ) -> Step[PDSplitState]:
        match happened:
            case Arrival(item=Request() as request):
                return self._sent(state, request)
            case FirstToken() | LoadReported() | KVMoved() if state.forecast is not None:
                forecast = self._informed(state.forecast, happened, now)
                return Step(msgspec.structs.replace(state, forecast=forecast))
            case Signal(kind="forget", request_id=request_id) if state.forecast is not None:
                forecast = state.forecast.ended(request_id)
                return Step(msgspec.structs.replace(state, forecast=forecast))
            case PrefixesChanged(engine=engine, index=index):
                indexes = {**state.indexes, engine: index}
                return Step(msgspec.structs.replace(state, indexes=indexes))
            case HealthChanged(node=node, replica=replica, is_up=is_up):
                watched = self.targets if self.gain is not None else self.prefill_targets
                if all(target.node != node for target in watched):
                    return Step(state)
                changed = frozenset({(node, replica)})
                down = state.down - changed if is_up else state.down | changed
                return Step(self._after_change(state, down, state.num_replicas))
            case Topology(num_replicas=num_replicas):
                return Step(self._after_change(state, state.down, num_replicas))
        return Step(state)

    def _sent(self, state: PDSplitState, request: Request) -> Step[PDSplitState]:
        looked_up = {AGGREGATED: self._looked_up(AGGREGATED, state, request)}
        is_split = not state.is_prefill_down and self._is_disaggregated(state, request, looked_up)
        way = DISAGGREGATED if is_split else AGGREGATED
        chosen = looked_up.get(way) or self._looked_up(way, state, request)
        if state.forecast is not None:
            forecast = state.forecast.sent(chosen, way)
            state = msgspec.structs.replace(state, forecast=forecast)
        return Step(state, (Emit(chosen, way),))

    def _is_disaggregated(
        self, state: PDSplitState, request: Request, looked_up: dict[str, Request]
    ) -> bool:
        """Whether a request is disaggregated. Adds to `looked_up` what is looked up, by way."""
        if self.gain is not None and state.forecast is not None:
            looked_up[DISAGGREGATED] = self._looked_up(DISAGGREGATED, state, request)
            up = UpReplicas(state.down, state.num_replicas)
            counts = {target.engine: up.count(target) for target in self.targets}
            is_worth_it = self.gain.is_worth_it(state.forecast, looked_up, counts)
            if is_worth_it is not None:
                return is_worth_it
        return is_disaggregated(looked_up[AGGREGATED], self.options)

    def _informed(
        self,
        forecast: SplitForecast,
        happened: FirstToken | LoadReported | KVMoved,
        now: float,
    ) -> SplitForecast:
        """The forecast with one more measurement."""
        assert self.gain is not None
        if isinstance(happened, KVMoved):
            return forecast.transferred(happened)
        for way, side in self.gain.sides.items():
            if happened.node not in side.nodes:
                continue
            if isinstance(happened, FirstToken):
                return forecast.begun(happened, way)
            return forecast.reported(happened, side.decode, now)
        return forecast

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
        return PDSplitState(down, num_replicas, is_prefill_down, state.indexes, state.forecast)


def build(options: PDSplitOptions, setup: Setup) -> PDSplit:
    """Make the operator. Raises ValueError for an option that the strategy does not use."""
    _refuse_unused(options, setup.name)
    only = frozenset({DISAGGREGATED})
    # If an engine that both outlets lead to (decode's) is down, neither outlet is better.
    shared = {target.engine for target in setup.targets if target.outlets != only}
    prefill_targets = tuple(
        target for target in setup.targets if target.outlets == only and target.engine not in shared
    )
    lookups = {port.name: PrefixLookup.of(setup, port.name) for port in SPEC.outlets}
    gain = _gain(options, setup) if options.strategy == "adaptive" else None
    return PDSplit(options, prefill_targets, lookups, gain, setup.targets)


def _gain(options: PDSplitOptions, setup: Setup) -> SplitGain:
    """The prediction over the engines of both outlets. Raises ValueError if one is missing."""
    sides = {}
    for way in (AGGREGATED, DISAGGREGATED):
        behind = [one for one in setup.targets if way in one.outlets]
        decoding = [one for one in behind if one.op in DECODING]
        entered = [one for one in behind if one.is_next]
        if not decoding or not entered:
            raise ValueError(f"{setup.name}: strategy adaptive: outlet {way} leads to no engine")
        nodes = frozenset(one.node for one in decoding)
        sides[way] = SplitSide(entered[0].engine, decoding[0].engine, nodes)
    facts, token_s = setup.facts.get(sides[DISAGGREGATED].prefill), 0.0
    if facts is not None and options.kv_bytes_per_s is not None:
        token_s = facts.kv_block_bytes / max(facts.block_size, 1) / options.kv_bytes_per_s
    return SplitGain(AGGREGATED, DISAGGREGATED, sides, options.answer_tokens, token_s)


def _refuse_unused(options: PDSplitOptions, name: str) -> None:
    default, unused = PDSplitOptions(), set[str]()
    if options.strategy != "adaptive":
        unused |= {"answer_tokens", "kv_bytes_per_s"}
    if options.strategy == "ratio":
        unused.add("min_uncached_tokens")
    for one in sorted(unused):
        if getattr(options, one) != getattr(default, one):
            raise ValueError(
                f"{name}: strategy {options.strategy} does not use {one}: leave it out, or choose "
                f"{'threshold' if one == 'min_uncached_tokens' else 'adaptive'}"
            )
