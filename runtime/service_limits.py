"""Limits of the requests in service, by the load of decode engines and by late first tokens."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from sagellm.runtime.decode_load import DecodeLoad, MeasuredSteps, PredictedLoad, UpReplicas
from sagellm.runtime.feedback import FirstToken, HealthChanged, LoadReported, Topology
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Setup, Target
from sagellm.runtime.port import EngineFacts

LoadTime: TypeAlias = Literal["prefill_end", "arrival"]
LimitRefusal: TypeAlias = tuple[str, str]  # code and reason
DECODING = frozenset({"decode", "generate"})  # the kinds of operators whose engines decode
ACCEPTED: LimitRefusal = ("", "")
SHARES = (1.0, 0.9, 0.8, 0.6, 0.4)  # of each bound, by priority: 0 critical ... 4 background
_SHED_S = 2.0  # after a refusal, less urgent requests are refused for this time
_CONCURRENCY = ("min_concurrency", "max_concurrency")
_BACKOFF = 0.9  # factor on the concurrency after a late first token
_USED = 0.5  # the concurrency grows only while at least this share of it is in use


def share_of(request: Request) -> float:
    """The share of each bound that the request may use. A priority outside 0 to 4 counts as the
    nearest one.
    """
    return SHARES[min(max(request.priority, 0), len(SHARES) - 1)]


def says_share(request: Request) -> str:
    share = share_of(request)
    return "" if share == 1 else f", of which priority {request.priority} may use {share:.0%}"


class Shedding(msgspec.Struct, frozen=True):
    """Requests of `priority` and less urgent ones are refused until `until_s`, because a more
    urgent request was.
    """

    priority: int = len(SHARES)
    until_s: float = 0.0

    def refuses(self, priority: int, now: float) -> bool:
        return priority >= self.priority and now < self.until_s

    def refused(self, priority: int, used: float, now: float) -> "Shedding":
        """The state after a refusal of `priority`, while waiting requests use up the part `used` of
        a bound.
        """
        kept_out = (
            level for level, share in enumerate(SHARES) if level > priority and share < used
        )
        lowest = min(kept_out, default=len(SHARES))
        if now < self.until_s and self.priority < lowest:
            return self
        return Shedding(lowest, now + _SHED_S)


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`slo_ttft_s`: the TTFT objective of requests that have none, for this operator and later
    operators; None: such requests have no objective.

    Two limits hold for the load of the engines that decode, also while engines have room.
    `max_decode_load`: a share of the sequences, or of the KV tokens, that these engines can hold;
    a request above it is refused with code `decode_full`. `slo_tpot_s`: the TPOT objective of all
    requests; a request is refused with `slo_unreachable` if steps with so many sequences take
    longer. `load_at`: `prefill_end` compares the load that is predicted for the end of the
    request's prefill (`DecodeLoad`), `arrival` the current load, which lacks the requests whose
    prompts are still computed. So with `arrival`, long prefills let the load swing between idle
    and full.

    `concurrency: adaptive` bounds the requests in service, waiting ones included, between
    `min_concurrency` and `max_concurrency`: the limit rises while first tokens come within
    `slo_ttft_s`, and falls when they are late (`ConcurrencyLimit`). A request above it is refused
    with code `concurrency_limit`.
    """

    slo_ttft_s: float | None = field(default=None, metadata={"min": 1e-3})
    max_decode_load: float | None = field(default=None, metadata={"min": 1e-3})
    slo_tpot_s: float | None = field(default=None, metadata={"min": 1e-6})
    load_at: LoadTime = "prefill_end"
    concurrency: Literal["unlimited", "adaptive"] = "unlimited"
    min_concurrency: int = field(default=8, metadata={"min": 1})
    max_concurrency: int = field(default=4096, metadata={"min": 1})

    @property
    def limits_decode(self) -> bool:
        """Whether an option limits the load of the engines that decode."""
        return self.max_decode_load is not None or self.slo_tpot_s is not None

    @property
    def is_adaptive(self) -> bool:
        return self.concurrency == "adaptive"


class Asked(NamedTuple):
    """A request to judge: its choices, the share of each limit that it may use, the present time,
    and the predicted time of its first token.
    """

    num_choices: int
    share: float
    now: float
    first_s: float


class ConcurrencyLimit(msgspec.Struct, frozen=True):
    """The most requests that may be in service, between `least` and `most`. Immutable.

    AIMD, additive increase and multiplicative decrease. A first token in time raises the limit by
    1 / limit, so by one for each round of as many requests as the limit allows. Before the first
    late token it raises the limit by one (slow start). A late first token lowers the limit to 90 %,
    once for each round: a request that arrived before the last decrease shows nothing of the lower
    limit. While less than half of the limit is in use, it does not grow.

    Source: Chiu and Jain, Analysis of the Increase and Decrease Algorithms, 1989; slow start and
    one decrease a round as in TCP (Jacobson 1988); factor and condition of AIMDLimit in Netflix's
    concurrency-limits.
    """

    least: int
    most: int
    limit: float
    lowered_s: float | None = None  # the time of the last decrease

    @classmethod
    def between(cls, least: int, most: int) -> "ConcurrencyLimit":
        """The limit before any first token: `least`."""
        return cls(least, most, float(least))

    def after(
        self, first: FirstToken, objective_s: float, num_open: int, now: float
    ) -> "ConcurrencyLimit":
        """The limit after a first token, while `num_open` requests are in service.

        A request with a longer objective of its own does not count, as it may wait for others.
        """
        since_s, own_s = first.since_arrival_s, first.slo_ttft_s
        if since_s is None or (own_s is not None and own_s > objective_s):
            return self
        if since_s > objective_s:
            is_old = self.lowered_s is not None and now - since_s < self.lowered_s
            lowered = max(_BACKOFF * self.limit, float(self.least))
            return self if is_old else replace(self, limit=lowered, lowered_s=now)
        if num_open < _USED * self.limit:
            return self
        step = 1.0 if self.lowered_s is None else 1 / self.limit
        return replace(self, limit=min(self.limit + step, float(self.most)))


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """The rule by which a request is refused because too many sequences would decode.

    `max_load`: of the sequences, or the KV tokens, that the engines can hold, the larger share.
    `slo_tpot_s`: the TPOT objective. `load_at`: the time of the load that is compared: the end of
    the request's prefill, or its arrival. `targets`: an operator of each engine that decodes.
    `nodes`: all operators that decode. `facts`: by engine.
    """

    max_load: float | None
    slo_tpot_s: float | None
    load_at: LoadTime
    targets: tuple[Target, ...]
    nodes: frozenset[str]
    facts: Mapping[str, EngineFacts]

    @classmethod
    def of(
        cls, max_load: float | None, slo_tpot_s: float | None, load_at: LoadTime, setup: Setup
    ) -> "DecodeLimit":
        """The rule for the engines downstream of an operator."""
        decoding = [one for one in setup.targets if one.op in DECODING]
        targets = tuple({one.engine or one.node: one for one in decoding}.values())
        nodes = frozenset(one.node for one in decoding)
        return cls(max_load, slo_tpot_s, load_at, targets, nodes, setup.facts)

    def refusal(self, load: DecodeLoad, up: UpReplicas, asked: Asked) -> LimitRefusal:
        """The refusal of a request, or ACCEPTED. While no request is in service, each is accepted:
        a limit below one request would otherwise refuse all.
        """
        num_up = sum(up.count(target) for target in self.targets)
        if not load.requests or num_up < 1:
            return ACCEPTED
        is_late = self.load_at == "prefill_end"
        found = load.at(asked.first_s, asked.now) if is_late else load.current
        num_sequences = found.num_sequences + asked.num_choices
        full = max(self._shares(found, num_sequences, up), default=0.0)
        if self.max_load is not None and full > asked.share * self.max_load:
            when = "when its prompt is computed" if is_late else "now"
            return "decode_full", (
                f"{num_sequences:.0f} sequences would decode {when}, {full:.0%} of what engines "
                f"hold (max_decode_load={self.max_load:g})"
            )
        return self._late(load.steps, num_sequences / num_up, asked.share)

    def _late(self, steps: MeasuredSteps, num_each: float, share: float) -> LimitRefusal:
        """The refusal if `num_each` sequences of a replica break the TPOT objective."""
        if self.slo_tpot_s is None:
            return ACCEPTED
        within, step_s = steps.num_within(self.slo_tpot_s), steps.step_s(num_each)
        # The share is one of sequences: a share of the time might leave no room for any step.
        if within is None or step_s is None or num_each <= share * max(within, 1.0):
            return ACCEPTED
        return "slo_unreachable", (
            f"its tokens might take {step_s * 1e3:.1f} ms each, and the objective is "
            f"{self.slo_tpot_s * 1e3:g} ms"
        )

    def _shares(
        self, found: PredictedLoad, num_sequences: float, up: UpReplicas
    ) -> Iterator[float]:
        """The shares of the sequences and of the tokens that engines can hold."""
        known = [(up.count(one), self.facts.get(one.engine)) for one in self.targets]
        most_sequences = sum(count * facts.max_num_seqs for count, facts in known if facts)
        most_tokens = sum(
            count * facts.num_token_blocks * facts.block_size for count, facts in known if facts
        )
        if most_sequences:
            yield num_sequences / most_sequences
        if most_tokens:
            yield found.num_tokens / most_tokens


class InService(msgspec.Struct, frozen=True):
    """The requests in service, and what limits them. Immutable.

    `limit`: of their number; None: unlimited. `rule`: of the load of decode engines; None: none.
    `objective_s`: the TTFT objective by which `limit` judges first tokens.
    """

    load: DecodeLoad = DecodeLoad()
    up: UpReplicas = UpReplicas()
    limit: ConcurrencyLimit | None = None
    rule: DecodeLimit | None = None
    objective_s: float | None = None

    def after(
        self, happened: FirstToken | LoadReported | HealthChanged | Topology, now: float
    ) -> "InService":
        """The state with one more report."""
        match happened:
            case FirstToken(request_id=request_id):
                limit, load = self.limit, self.load
                if limit is not None and self.objective_s is not None:
                    limit = limit.after(happened, self.objective_s, load.num_open, now)
                return replace(self, load=load.begun(request_id, now), limit=limit)
            case LoadReported(node=node):
                is_ours = self.rule is not None and node in self.rule.nodes
                return replace(self, load=self.load.reported(happened, now)) if is_ours else self
        return replace(self, up=self.up.after(happened))

    def admitted(self, request: Request, first_s: float) -> "InService":
        """The state with one more request, whose first token is predicted for `first_s`."""
        return replace(self, load=self.load.admitted(request, first_s))

    def ended(self, request_id: str, now: float) -> "InService":
        """The state after a request has ended; unknown requests are ignored."""
        return replace(self, load=self.load.ended(request_id, now))

    def holds(self, request_id: str) -> bool:
        return request_id in self.load.requests

    def refusal(self, asked: Asked) -> LimitRefusal:
        """The refusal of a request by any limit, or ACCEPTED."""
        num_open = self.load.num_open
        limit = None if self.limit is None else max(asked.share * self.limit.limit, 1.0)
        if limit is not None and num_open and num_open + asked.num_choices > limit:
            return "concurrency_limit", (
                f"{num_open} requests are in service, and first tokens come in time with "
                f"{limit:.0f}"
            )
        return ACCEPTED if self.rule is None else self.rule.refusal(self.load, self.up, asked)


def service_of(options: ServiceOptions, setup: Setup) -> InService | None:
    """The requests in service before any request; None if no option limits them.

    Raises ValueError for options that contradict each other.
    """
    _check(options, setup.name)
    if not options.limits_decode and not options.is_adaptive:
        return None
    rule, limit = None, None
    if options.limits_decode:
        rule = DecodeLimit.of(options.max_decode_load, options.slo_tpot_s, options.load_at, setup)
    if options.is_adaptive:
        limit = ConcurrencyLimit.between(options.min_concurrency, options.max_concurrency)
    return InService(limit=limit, rule=rule, objective_s=options.slo_ttft_s)


def _check(options: ServiceOptions, name: str) -> None:
    """Raise ValueError for an option that would have no effect, and for an empty range."""
    default = ServiceOptions()
    if options.load_at != default.load_at and not options.limits_decode:
        raise ValueError(
            f"{name}: load_at={options.load_at} has no effect: give max_decode_load or slo_tpot_s"
        )
    given = [one for one in _CONCURRENCY if getattr(options, one) != getattr(default, one)]
    if given and not options.is_adaptive:
        raise ValueError(f"{name}: {given[0]} has no effect: add concurrency: adaptive")
    if options.is_adaptive and options.slo_ttft_s is None:
        raise ValueError(
            f"{name}: concurrency: adaptive judges first tokens by slo_ttft_s: give this objective"
        )
    if options.min_concurrency > options.max_concurrency:
        raise ValueError(
            f"{name}: min_concurrency={options.min_concurrency} is above "
            f"max_concurrency={options.max_concurrency}: exchange them"
        )
