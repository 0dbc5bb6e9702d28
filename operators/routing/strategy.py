"""What a strategy is, and what it sees of the replicas that a request may go to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from sagellm.graphs.diagnostics import Path
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
    """The replicas of one pool that a strategy orders for one request: those that are up and have
    room; where none has, those that are up; where none is, all. At the last two the request waits.

    `turn` rises by one with each request that was routed. `facts` are those of the engine, None
    where they are not known: `block_size`, `num_blocks`, `max_num_seqs`, `max_model_len` ...
    `forecast` knows something where the strategy subscribes to "first_token".
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
        """All candidates, ascending. Linear in their number."""
        return tuple(bits(self.pool.candidates))

    @property
    def mask(self) -> int:
        """The same as a mask: bit n is set where replica n is a candidate."""
        return self.pool.candidates

    @property
    def busy(self) -> int:
        """The mask of replicas that are up and have no room."""
        return self.pool.up & ~self.pool.free

    @property
    def cached(self) -> Cached:
        """How many tokens of the request are cached on which replicas, candidates or not. It is
        looked up when it is first asked for.
        """
        if self._cached is None:
            index, hasher, self._cached = self.pool.index, self._hasher, NOTHING_CACHED
            if index is not None and hasher is not None:
                self._cached = index.cached(self.request, hasher)
        return self._cached

    def num_cached_tokens(self, number: int) -> int:
        """Tokens of the request that a replica has in its prefix cache, as far as engines say it: 0
        where the strategy does not subscribe to "cache".
        """
        return self.cached.num_tokens(number)

    def num_uncached_tokens(self, number: int) -> int:
        """Tokens of the request that a replica would have to compute."""
        known = len(self.request.prompt_token_ids) + len(self.request.emitted_token_ids)
        return known - self.num_cached_tokens(number)

    def num_pending_tokens(self, number: int) -> int:
        """Prompt tokens that a replica has to compute before those of a new request: as its engine
        reported, and of what was sent there since.
        """
        return self.pool.replicas[number].num_pending

    def prefill_s(self, number: int) -> float | None:
        """Predicted seconds until a replica has computed the prompt, after those that it has to
        compute already; None before there is evidence.
        """
        num_tokens = self.num_pending_tokens(number) + self.num_uncached_tokens(number)
        return self.forecast.prefill_s(num_tokens)

    @property
    def step_s(self) -> float | None:
        """Predicted seconds of an engine step, so of each further token; None: not known."""
        return self.forecast.step_s

    def num_requests(self, number: int) -> int:
        """Requests that a replica has."""
        known = self.pool.replicas[number]
        return max(known.num_held, known.num_reported)

    def num_left(self, number: int) -> float:
        """Requests that a replica still has credit for."""
        return self.pool.replicas[number].num_left

    def load(self, number: int) -> float:
        """Outstanding tokens of a replica."""
        return self.pool.replicas[number].load(tokens_of(self.request))

    def least_loaded(self) -> int:
        """Ties go round, so that an idle pool fills evenly."""
        start = self.turn % self.pool.size
        found = self.pool.loads.argmin(start)
        return found if found is not None else min(self.numbers, key=self._waiting_rank(start))

    def by_load(self) -> Iterator[int]:
        """The candidates, least loaded first; the first comes at once, the others are sorted."""
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
    """As the first of an order: a replica that the request waits for although others have room, for
    `limit_s` at most from the first time that it was held back. After that the next ones are tried.
    """

    replica: int
    limit_s: float


# Replicas of the candidates, best first; one alone may be given as it is.
Order: TypeAlias = int | Hold | Iterable[int | Hold]
# The third argument is a random source.
StrategyFunction: TypeAlias = Callable[[Candidates, float, Draw], Order]


class Strategy(Protocol):
    """A strategy with options, or with a state of its own: a frozen dataclass, whose fields are the
    options that `strategy_options` of `route` gives.

    One that also has `subscribes`, of kinds of feedback, needs "cache" for
    `candidates.num_cached_tokens`, or "first_token" for `prefill_s`, `step_s` and `forecast`. What
    nobody needs is not sent.
    """

    @property
    def initial(self) -> Any:
        """Its first state, a value; each pool of replicas has one."""

    def order(
        self, state: Any, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, Any]:
        """The order for one request, and the state after the request was sent to the first that
        has credit; where none has, the state stays as it is, and the request is ordered again.
        """


RegisteredStrategy: TypeAlias = StrategyFunction | type[Strategy]


def check_strategy(name: str, value: Any) -> Any:
    """The value itself. Raises TypeError for what is no strategy."""
    if not isinstance(value, type):
        return check_callable(name, value, takes=("candidates", "now", "draw"))
    return check_user_class(f"strategy {name!r}", value, ("initial", "order"))


def make_strategy(
    found: RegisteredStrategy, name: str, given: Mapping[str, Any], path: Path
) -> StrategyFunction | Strategy:
    """A strategy with its options, which stand at `path` of the graph. Raises GraphError."""
    if isinstance(found, type):
        return check_and_read_options(found, given, path)
    refuse_options(f"strategy `{name}`", given, path)
    return found
