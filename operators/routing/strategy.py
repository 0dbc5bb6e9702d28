"""What a strategy is, and what it sees of the replicas that a request may go to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sagellm.graphs.diagnostics import Path
from sagellm.graphs.vocabulary import nearest
from sagellm.operators.routing.view import PoolView, bits, tokens_of
from sagellm.runtime.forecast import Forecast
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
    """The replicas of one pool that a strategy orders for one request.

    Candidates are the replicas that are up and have room; if there are none, those that are up; if
    none is up, all. In the last two cases the request waits.

    `turn` rises by one with each routed request. `facts` are those of the engine (`block_size`,
    `num_blocks`, `max_num_seqs`, `max_model_len` ...), None if unknown. `forecast` has predictions
    if the strategy subscribes to "first_token".
    """

    __slots__ = ("_cached", "_hasher", "facts", "forecast", "pool", "request", "turn")

    def __init__(
        self,
        pool: PoolView,
        request: Request,
        turn: int,
        hasher: Hasher | None = None,
        facts: EngineFacts | None = None,
        forecast: Forecast = NOTHING_KNOWN,
    ) -> None:
        self.pool = pool
        self.request = request
        self.turn = turn
        self.facts = facts
        self.forecast = forecast
        self._hasher = hasher
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
        """How many tokens of the request are cached on which replicas, candidates or not.

        Looked up on first use, because a strategy may not need it.
        """
        if self._cached is None:
            index, hasher, self._cached = self.pool.index, self._hasher, NOTHING_CACHED
            if index is not None and hasher is not None:
                self._cached = index.cached(self.request, hasher)
        return self._cached

    def num_cached_tokens(self, number: int) -> int:
        """Tokens of the request that a replica has in its prefix cache, as engines report.

        0 if the strategy does not subscribe to "cache".
        """
        return self.cached.num_tokens(number)

    def num_uncached_tokens(self, number: int) -> int:
        """Tokens of the request that a replica would have to compute."""
        known = len(self.request.prompt_token_ids) + len(self.request.emitted_token_ids)
        return known - self.num_cached_tokens(number)

    def num_pending_tokens(self, number: int) -> int:
        """Prompt tokens that a replica has to compute before those of a new request: by its last
        report, and of requests sent there since.
        """
        return self.pool.replicas[number].num_pending

    def prefill_s(self, number: int) -> float | None:
        """Predicted seconds until a replica has computed its pending prompts and this one; None
        before there is evidence.
        """
        num_tokens = self.num_pending_tokens(number) + self.num_uncached_tokens(number)
        return self.forecast.prefill_s(num_tokens)

    @property
    def step_s(self) -> float | None:
        """Predicted seconds of an engine step, and so of each further token; None: unknown."""
        return self.forecast.step_s

    def num_requests(self, number: int) -> int:
        """The number of requests that a replica has."""
        known = self.pool.replicas[number]
        return max(known.num_held, known.num_reported)

    def num_left(self, number: int) -> float:
        """The number of requests that a replica still has credit for."""
        return self.pool.replicas[number].num_left

    def load(self, number: int) -> float:
        """The outstanding tokens of a replica."""
        return self.pool.replicas[number].load(tokens_of(self.request))

    def least_loaded(self) -> int:
        """The candidate of least load. Ties go round, so that an idle pool fills evenly."""
        start = self.turn % self.pool.size
        found = self.pool.loads.argmin(start)
        return found if found is not None else min(self.numbers, key=self._waiting_rank(start))

    def by_load(self) -> Iterator[int]:
        """The candidates, least loaded first. The first comes without sorting the others."""
        first = self.least_loaded()
        yield first
        rank = self._waiting_rank(self.turn % self.pool.size)
        yield from sorted((number for number in self.numbers if number != first), key=rank)

    def rest(self, tried: int) -> Iterator[int]:
        """The candidates outside of the mask `tried`, least loaded first."""
        if tried != self.mask:
            yield from (number for number in self.by_load() if not tried >> number & 1)

    def _waiting_rank(self, start: int) -> Callable[[int], tuple[float, int]]:
        size = self.pool.size
        return lambda number: (self.load(number), (number - start) % size)


@dataclass(frozen=True, slots=True)
class Hold:
    """The first of an order: a replica that the request waits for although others have room.

    The request waits at most `limit_s`, counted from when it was first held back; then the next
    replicas of the order are tried.
    """

    replica: int
    limit_s: float


# Feedback that every router gets, and feedback that a strategy may subscribe to in addition.
ROUTER_FEEDBACK = frozenset({"credit", "load", "health", "topology"})
STRATEGY_FEEDBACK = frozenset({"cache", "first_token"})

# Numbers of replicas, best first, or one number.
Order: TypeAlias = int | Hold | Iterable[int | Hold]
# From the candidates, the time in seconds and a random source to an order.
StrategyFunction: TypeAlias = Callable[[Candidates, float, Draw], Order]


class Strategy(Protocol):
    """A strategy with options, or with a state of its own: a frozen dataclass, whose fields are the
    options that `strategy_options` of `route` gives.

    Its attribute `subscribes`, if it has one, names the feedback that it needs: "cache" for
    `candidates.num_cached_tokens`, "first_token" for `prefill_s`, `step_s` and `forecast`. Feedback
    that no operator subscribes to is not sent.
    """

    @property
    def initial(self) -> Any:
        """The first state, a value. Each pool of replicas has a state of its own."""

    def order(
        self, state: Any, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, Any]:
        """The order for one request, and the next state.

        The request is sent to the first replica with credit, and the next state holds. If none has
        credit, the state does not change, and the request is ordered again later.
        """


RegisteredStrategy: TypeAlias = StrategyFunction | type[Strategy]


def check_strategy(name: str, value: Any) -> Any:
    """The strategy itself. Raises TypeError for a value that is none."""
    if not isinstance(value, type):
        return check_callable(name, value, takes=("candidates", "now", "draw"))
    return check_user_class(f"strategy {name!r}", value, ("initial", "order"))


def make_strategy(
    found: RegisteredStrategy, name: str, given: Mapping[str, Any], path: Path
) -> StrategyFunction | Strategy:
    """A strategy with its options, which are at `path` of the graph. Raises GraphError."""
    if isinstance(found, type):
        return check_and_read_options(found, given, path)
    refuse_options(f"strategy `{name}`", given, path)
    return found


def wanted_feedback(strategy: StrategyFunction | Strategy, name: str, node: str) -> frozenset[str]:
    """The kinds of feedback that a strategy subscribes to.

    Raises ValueError for an unknown kind; the message begins with `node`, the operator's name.
    """
    wanted = frozenset(getattr(strategy, "subscribes", ()))
    known = sorted(ROUTER_FEEDBACK | STRATEGY_FEEDBACK)
    for kind in sorted(wanted.difference(known)):
        hint = f"did you mean {nearest(kind, known) or ' or '.join(known)}?"
        raise ValueError(f"{node}: strategy {name} subscribes to {kind!r}: {hint}")
    return wanted
