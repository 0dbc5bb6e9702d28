"""The predicted gain of a request whose prompt is computed on another engine than its answer."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.decode_load import MeasuredSteps
from sagellm.runtime.feedback import FirstToken, KVMoved, LoadReported
from sagellm.runtime.forecast import LineFit
from sagellm.runtime.messages import Request

_MIN_PREFILLS = 4  # measured prefills before a side is predicted
_FADE = 1 - 1 / 64  # factor on the weight of earlier samples, with each new sample


@dataclass(frozen=True, slots=True)
class SplitSide:
    """One of the two ways of a request. `prefill` and `decode`: the engines that compute its prompt
    and its answer; one engine, if the way is aggregated. `nodes`: the operators that report first
    tokens.
    """

    prefill: str
    decode: str
    nodes: frozenset[str]


class SideForecast(msgspec.Struct, frozen=True):
    """The prefills of one way. `num_pending`, `num_pending_tokens`: the prompts that were sent and
    have no first token yet. `fit`: the time of a prefill by computed tokens.
    """

    num_pending: int = 0
    num_pending_tokens: int = 0
    fit: LineFit = LineFit()
    num_measured: int = 0

    def sent(self, num_tokens: int, number: int = 1) -> "SideForecast":
        """The forecast with `number` more prompts of `num_tokens` tokens (-1: one fewer)."""
        num_pending = self.num_pending + number
        return replace(
            self,
            num_pending=num_pending,
            num_pending_tokens=self.num_pending_tokens + number * num_tokens,
        )

    def measured(self, first: FirstToken) -> "SideForecast":
        """The forecast with one more measured prefill."""
        if first.num_computed_tokens <= 0:
            return self
        fit = self.fit.with_samples(first.num_computed_tokens, first.computed_s, kept=_FADE)
        return replace(self, fit=fit, num_measured=self.num_measured + 1)

    @property
    def is_known(self) -> bool:
        return self.num_measured >= _MIN_PREFILLS


class SplitForecast(msgspec.Struct, frozen=True):
    """The measurements of both ways. Immutable.

    `sides`: by way. `pending`: by request id, its prompts without a first token, as (way, tokens).
    `steps`: of each engine that decodes. `transfers`: the time of a transfer by tokens.
    """

    sides: Mapping[str, SideForecast]
    pending: Map[str, tuple[tuple[str, int], ...]] = Map()
    steps: Mapping[str, MeasuredSteps] = {}
    transfers: LineFit = LineFit()

    def sent(self, request: Request, way: str) -> "SplitForecast":
        """The forecast after a request was sent on a way."""
        num_tokens, request_id = request.num_uncached_tokens, request.request_id
        pending = (*self.pending.get(request_id, ()), (way, num_tokens))
        sides = {**self.sides, way: self.sides[way].sent(num_tokens)}
        return replace(self, sides=sides, pending=self.pending.set(request_id, pending))

    def begun(self, first: FirstToken, way: str) -> "SplitForecast":
        """The forecast after a first token came on a way."""
        sides = {**self.sides, way: self.sides[way].measured(first)}
        after = replace(self, sides=sides)
        for place in self.pending.get(first.request_id, ()):
            if place[0] == way:
                return after._without(first.request_id, place)
        return after

    def ended(self, request_id: str) -> "SplitForecast":
        """The forecast after a request has ended."""
        after = self
        for place in self.pending.get(request_id, ()):
            after = after._without(request_id, place)
        return after

    def transferred(self, happened: KVMoved) -> "SplitForecast":
        fit = self.transfers.with_samples(happened.num_tokens, happened.seconds, kept=_FADE)
        return replace(self, transfers=fit)

    def reported(self, happened: LoadReported, engine: str, now: float) -> "SplitForecast":
        """The forecast with one more report of the load of `engine`, by any of its operators."""
        known = self.steps.get(engine, MeasuredSteps())
        report = replace(happened, node=engine)
        return replace(self, steps={**self.steps, engine: known.after(report, now)})

    def _without(self, request_id: str, place: tuple[str, int]) -> "SplitForecast":
        """The forecast without one pending prompt of a request."""
        way, num_tokens = place
        rest = list(self.pending[request_id])
        rest.remove(place)
        pending = self.pending.delete(request_id)
        if rest:
            pending = pending.set(request_id, tuple(rest))
        sides = {**self.sides, way: self.sides[way].sent(num_tokens, -1)}
        return replace(self, sides=sides, pending=pending)


@dataclass(frozen=True, slots=True)
class SplitGain:
    """Predicts whether a request should be disaggregated.

        gain = TTFT aggregated - TTFT disaggregated + delay of others + answer * (TPOT aggregated -
               TPOT disaggregated)

    TTFT is the time of the pending prompts of a replica and of the request's own uncached tokens.
    The delay of others: an aggregated prefill takes its time from every sequence that decodes on
    its replica. TPOT is the time of a step with one more sequence, and differs only if the two ways
    decode on different engines. The request is disaggregated if the gain is longer than the
    transfer of its KV blocks. All times are sums over requests, in seconds.

    `answer_tokens`: the tokens of an answer that count, where `max_tokens` is not lower.
    `transfer_token_s`: the time to move a token's blocks, until a transfer was measured.
    """

    aggregated: str
    disaggregated: str
    sides: Mapping[str, SplitSide]
    answer_tokens: int
    transfer_token_s: float = 0.0

    def is_worth_it(
        self,
        forecast: SplitForecast,
        requests: Mapping[str, Request],
        counts: Mapping[str, int],
    ) -> bool | None:
        """Whether the gain is longer than the transfer; None: too little was measured.

        `requests`: the request with its cached tokens, by way. `counts`: the replicas that are up,
        by engine.
        """
        if not any(side.is_known for side in forecast.sides.values()):
            return None
        ttft_s = {way: self._ttft_s(forecast, way, requests[way], counts) for way in self.sides}
        gain_s = ttft_s[self.aggregated] - ttft_s[self.disaggregated]
        gain_s += self._delay_s(forecast, requests[self.aggregated], counts)
        num_tokens = min(requests[self.aggregated].sampling.max_tokens, self.answer_tokens)
        gain_s += num_tokens * self._tpot_gain_s(forecast, counts)
        return gain_s > self._transfer_s(forecast, requests[self.disaggregated])

    def _fit(self, forecast: SplitForecast, way: str) -> LineFit:
        """The measured prefills of a way, or of the other way until its own are known."""
        own = forecast.sides[way]
        other = self.disaggregated if way == self.aggregated else self.aggregated
        return own.fit if own.is_known else forecast.sides[other].fit

    def _ttft_s(
        self, forecast: SplitForecast, way: str, request: Request, counts: Mapping[str, int]
    ) -> float:
        side, fit = forecast.sides[way], self._fit(forecast, way)
        share = 1 / max(counts.get(self.sides[way].prefill, 1), 1)
        waits_s = fit.seconds_of(side.num_pending_tokens * share, side.num_pending * share)
        return waits_s + fit.seconds_of(request.num_uncached_tokens)

    def _num_running(
        self, forecast: SplitForecast, engine: str, counts: Mapping[str, int]
    ) -> float:
        steps = forecast.steps.get(engine, MeasuredSteps())
        return steps.num_running(frozenset({engine})) / max(counts.get(engine, 1), 1)

    def _delay_s(
        self, forecast: SplitForecast, request: Request, counts: Mapping[str, int]
    ) -> float:
        """The time that an aggregated prefill would take from the sequences of its replica.

        The prefill engine shows what the computation alone takes.
        """
        num_running = self._num_running(forecast, self.sides[self.aggregated].decode, counts)
        alone_s = self._fit(forecast, self.disaggregated).seconds_of(request.num_uncached_tokens)
        return num_running * alone_s

    def _tpot_gain_s(self, forecast: SplitForecast, counts: Mapping[str, int]) -> float:
        engines = [self.sides[way].decode for way in (self.aggregated, self.disaggregated)]
        if engines[0] == engines[1]:
            return 0.0
        together, apart = (
            forecast.steps.get(engine, MeasuredSteps()).step_s(
                self._num_running(forecast, engine, counts) + 1
            )
            for engine in engines
        )
        return 0.0 if together is None or apart is None else together - apart

    def _transfer_s(self, forecast: SplitForecast, request: Request) -> float:
        num_tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        if not forecast.transfers.weight:
            return num_tokens * self.transfer_token_s
        return forecast.transfers.seconds_of(num_tokens)
