"""The contract of a strategy, and `Candidates`: the replicas as a strategy sees them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Protocol, TypeAlias

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path
from sagellm.graphs.rules.rule import choice
from sagellm.graphs.vocabulary import nearest
from sagellm.operators.routing.view import PoolView, bits, tokens_of, turned
from sagellm.runtime.forecast import Forecast, ReplicaSpeed
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import NOTHING_CACHED, Cached, Hasher
from sagellm.runtime.registry import (
    check_and_read_options,
    check_callable,
    check_user_class,
    refuse_options,
)

NOTHING_KNOWN = Forecast()


class Candidates:
    """The replicas of one pool, those of engine `name`, that a strategy orders for one request.

    Candidates are the replicas that are up and have room. If no replica has room, all replicas that
    are up are candidates; if no replica is up, all replicas. In both cases the request waits.

    `turn` rises by one with each routed request. `chosen`: the replicas that the strategy has
    chosen for the request in earlier pools, by engine: the prefill replica before decode. `facts`
    are the engine's (`block_size`, `num_blocks`, `max_num_seqs`, `max_model_len` ...); None:
    unknown. `forecast` has predictions if the strategy subscribes to "first_token". `hasher` hashes
    prompts for a prefix index of the strategy's own.
    """

    __slots__ = (
        "_cached", "chosen", "facts", "forecast", "hasher", "name", "pool", "request", "turn",
    )  # fmt: skip

    def __init__(
        self,
        pool: PoolView,
        request: Request,
        turn: int,
        hasher: Hasher | None = None,
        facts: EngineFacts | None = None,
        forecast: Forecast = NOTHING_KNOWN,
        name: str = "",
        chosen: Mapping[str, int] = {},
    ) -> None:
        self.pool = pool
        self.request = request
        self.turn = turn
        self.facts = facts
        self.forecast = forecast
        self.hasher = hasher
        self.name = name
        self.chosen = chosen
        self._cached: Cached | None = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all candidates, ascending. Takes time linear in their number."""
        return tuple(bits(self.pool.candidates))

    @property
    def mask(self) -> int:
        """The candidates as a mask: bit n is set if replica n is a candidate."""
        return self.pool.candidates

    @property
    def busy(self) -> int:
        """The mask of replicas that are up and have no room."""
        return self.pool.up & ~self.pool.free

    @property
    def cached(self) -> Cached:
        """The number of tokens of the request that each replica has cached, for all replicas.

        The lookup happens on first use, because a strategy may not need the result.
        """
        if self._cached is None:
            index, hasher, self._cached = self.pool.index, self.hasher, NOTHING_CACHED
            if index is not None and hasher is not None:
                self._cached = index.cached(self.request, hasher)
        return self._cached

    def num_cached_tokens(self, number: int) -> int:
        """The number of the request's tokens in a replica's prefix cache, as engines report it; 0
        if the strategy does not subscribe to "cache".
        """
        return self.cached.num_tokens(number)

    def num_uncached_tokens(self, number: int) -> int:
        """The number of the request's tokens that a replica would have to compute."""
        known = len(self.request.prompt_token_ids) + len(self.request.emitted_token_ids)
        return known - self.num_cached_tokens(number)

    def num_pending_tokens(self, number: int) -> int:
        """The number of prompt tokens that a replica computes before a new request: those of its
        last report, and those of requests sent there since.
        """
        return self.pool.replicas[number].num_pending

    def prefill_s(self, number: int) -> float | None:
        """The predicted time, in seconds, until a replica has computed its pending prompts and the
        prompt of this request, by its own measured speed, or else by the mean of all replicas;
        None: too few measurements.
        """
        num_tokens = self.num_pending_tokens(number) + self.num_uncached_tokens(number)
        own_s = self.speed(number).prefill_s(num_tokens)
        return self.forecast.prefill_s(num_tokens) if own_s is None else own_s

    def speed(self, number: int) -> ReplicaSpeed:
        """The measured speed of a replica; unknown if the strategy does not subscribe to
        "first_token".
        """
        return self.pool.replicas[number].speed

    @property
    def step_s(self) -> float | None:
        """The predicted time of an engine step, and so of each decoded token, in seconds; None: too
        few measurements.
        """
        return self.forecast.step_s

    def num_requests(self, number: int) -> int:
        """The number of requests at a replica; see `ReplicaView.num_requests`."""
        return self.pool.replicas[number].num_requests

    def num_left(self, number: int) -> float:
        """The number of requests that a replica still has credit for."""
        return self.pool.replicas[number].num_left

    def load(self, number: int) -> float:
        """The number of outstanding tokens of a replica; see `load_balanced`."""
        return self.pool.replicas[number].load(tokens_of(self.request))

    def least_loaded(self) -> int:
        """The least loaded candidate. Equal candidates take turns, so that an idle pool fills
        evenly.
        """
        start = self.turn % self.pool.size
        found = self.pool.loads.argmin(start)
        return found if found is not None else min(self.numbers, key=self._waiting_rank(start))

    def lowest(self) -> int:
        """The candidate with the lowest `score` of the strategy; equal candidates take turns. The
        least loaded candidate, if the scores of all are infinite.
        """
        found = self.pool.scores.argmin(self.turn % self.pool.size)
        return self.least_loaded() if found is None else found

    def some(self, among: int, most: int) -> Iterator[int]:
        """At most `most` replicas of the mask `among`; each request gets the next ones."""
        return islice(turned(among, self.turn * most % self.pool.size), most)

    def warm(self, cached: Cached, among: int, most: int) -> Iterator[int]:
        """The replicas of the mask `among` with a cached prefix, longest prefix first; at most
        `most`. Equal replicas take turns.
        """
        start = self.turn % self.pool.size
        masks = (mask & among for _, mask in cached.levels)
        return islice((one for mask in masks for one in turned(mask, start)), most)

    def distance(self, number: int) -> int:
        """A rank for equal candidates, with which they take turns: the lowest goes first."""
        return (number - self.turn) % self.pool.size

    def by_load(self) -> Iterator[int]:
        """The candidates, least loaded first. The others are sorted only if the caller asks for a
        second one.
        """
        first = self.least_loaded()
        yield first
        rank = self._waiting_rank(self.turn % self.pool.size)
        yield from sorted((number for number in self.numbers if number != first), key=rank)

    def rest(self, tried: int) -> Iterator[int]:
        """The candidates that are not in the mask `tried`, least loaded first."""
        if tried != self.mask:
            yield from (number for number in self.by_load() if not tried >> number & 1)

    def _waiting_rank(self, start: int) -> Callable[[int], tuple[float, int]]:
        size = self.pool.size
        return lambda number: (self.load(number), (number - start) % size)


@dataclass(frozen=True, slots=True)
class Hold:
    """The first item of an order: a busy replica that the request waits for, although other
    replicas have room.

    The wait ends `limit_s` after the request was first held back. Then the next replicas of the
    order are tried.
    """

    replica: int
    limit_s: float


# Every router subscribes to the first set; a strategy may subscribe to the second in addition.
ROUTER_FEEDBACK = frozenset({"credit", "load", "health", "topology"})
STRATEGY_FEEDBACK = frozenset({"cache", "first_token"})

# The numbers of replicas, best first, or a single number.
Order: TypeAlias = int | Hold | Iterable[int | Hold]
# Takes the candidates, the time in seconds and a random source; returns an order.
StrategyFunction: TypeAlias = Callable[[Candidates, float, Draw], Order]


class Strategy(Protocol):
    """A strategy with options or a state: a frozen dataclass. Its fields are the options that
    `strategy_options` of `route` sets.

    An optional attribute `subscribes` names the feedback that the strategy needs: "cache" for
    `candidates.num_cached_tokens`, "first_token" for `speed`, `prefill_s`, `step_s` and `forecast`.
    Feedback that no operator subscribes to is not sent.

    An optional method `score(replica: ReplicaView) -> float` ranks replicas regardless of the
    request. It is called when a replica changes, so `candidates.lowest()` takes microseconds for
    any number of replicas. It must depend on nothing but the replica and the options.
    """

    @property
    def initial(self) -> Any:
        """The initial state, an immutable value. Each pool of replicas has its own state."""

    def order(
        self, state: Any, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, Any]:
        """The order for one request, and the next state.

        The request is sent to the first replica with credit, and the next state replaces `state`.
        If no replica has credit, the next state is discarded, and `order` is called again later.
        """


RegisteredStrategy: TypeAlias = StrategyFunction | type[Strategy]


def check_strategy(name: str, value: Any) -> Any:
    """Return `value` if it is a strategy. Raises TypeError otherwise."""
    if not isinstance(value, type):
        return check_callable(name, value, takes=("candidates", "now", "draw"))
    return check_user_class(f"strategy {name!r}", value, ("initial", "order"))


def make_strategy(
    found: RegisteredStrategy,
    name: str,
    given: Mapping[str, Any],
    path: Path,
    engines: tuple[str, ...] = (),
) -> StrategyFunction | Strategy:
    """Make a strategy with its options. Raises GraphError for wrong options; the error names
    `path`, the options' place in the graph.

    `engines`: the engines that the router chooses replicas of. A field of the strategy with the
    metadata `by_engine` is a mapping with some of them as keys.
    """
    if isinstance(found, type):
        made: Strategy = check_and_read_options(found, given, path)
        mistakes = tuple(_unknown_engines(made, path, engines))
        if mistakes:
            raise GraphError(mistakes)
        return made
    refuse_options(f"strategy `{name}`", given, path)
    return found


def _unknown_engines(made: Any, path: Path, engines: tuple[str, ...]) -> Iterator[Diagnostic]:
    for option in fields(made):
        named = getattr(made, option.name) if option.metadata.get("by_engine") else {}
        for engine in sorted(set(named).difference(engines)):
            message = f"this route chooses no replica of an engine `{engine}`"
            yield Diagnostic(
                "unknown-engine", (*path, option.name), message, choice(engine, engines)
            )


def wanted_feedback(strategy: StrategyFunction | Strategy, name: str, node: str) -> frozenset[str]:
    """The kinds of feedback that a strategy subscribes to. `node`: the operator, for messages.

    Raises ValueError for an unknown kind.
    """
    wanted = frozenset(getattr(strategy, "subscribes", ()))
    known = sorted(ROUTER_FEEDBACK | STRATEGY_FEEDBACK)
    for kind in sorted(wanted.difference(known)):
        hint = f"did you mean {nearest(kind, known) or ' or '.join(known)}?"
        raise ValueError(f"{node}: strategy {name} subscribes to {kind!r}: {hint}")
    return wanted
