"""An observer of a session: counts requests at submission, and tokens at their delivery."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sagellm.gateway.metrics.meters import UNKNOWN, Counts
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import SERVED, Answer, Forked, Item, Request, Stamps, TokenEvent

PROBE = "probe"  # the user id of the gateway's own probes
_NO_STAMPS = Stamps()
_UNKNOWN = LeaseShape(1)


@dataclass(slots=True)
class _Call:
    """The state that the choices of one request share. `longest`: tokens of the longest choice."""

    num_open: int
    longest: int = 0


@dataclass(slots=True)
class _Track:
    """The state of one open choice. Times are of the executor's clock."""

    counts: Counts
    call: _Call
    request: Request
    measure: "Measure"
    arrived_s: float
    num_tokens: int = 0
    num_cached: int = 0
    num_preemptions: int = 0  # in previous engines
    preempted_here: tuple[int, int] = (0, 0)  # (epoch, preemptions in the current engine)
    first_s: float = 0.0
    last_s: float = 0.0
    # Of the first event: the last event may come from outside the engine, without stamps.
    stamps: Stamps = _NO_STAMPS


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape and the size of an engine's KV blocks, to measure transfers."""

    lease: LeaseShape = _UNKNOWN
    block_bytes: int = 0

    def num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of KV that a transfer of a sequence of `num_tokens` tokens moves."""
        return self.lease.num_blocks(num_tokens, num_tokens) * self.block_bytes


@dataclass(frozen=True, slots=True)
class Measure:
    """The constants for measuring one model's requests.

    `slo_ttft_s`: the TTFT objective of requests that set none, in seconds.
    """

    kv: KVShape
    slo_ttft_s: float | None = None


class RequestObserver:
    """Counts the requests of a session, on the session's loop.

    `models` maps the names that clients may use to the names in metrics. Any other name counts as
    "unknown", so that clients cannot create labels. `now` is the executor's clock. `own` maps the
    name of a model in metrics to its `Measure`; other models have `kv` and `slo_ttft_s`. The cost
    is a few microseconds for each request, and about one for each token.
    """

    def __init__(
        self,
        now: Callable[[], float],
        models: Mapping[str, str],
        lengths: tuple[int, ...],
        kv: KVShape,
        slo_ttft_s: float | None = None,
        own: Mapping[str, Measure] = MappingProxyType({}),
    ) -> None:
        self._now = now
        self._models = dict(models)
        self._measure = Measure(kv, slo_ttft_s)
        self._own = dict(own)
        self._open: dict[tuple[str, int], _Track] = {}
        self._counts = {name: Counts(lengths) for name in (*models.values(), UNKNOWN)}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def snapshot(self) -> dict[str, Counts]:
        """Return copies of the counts, by model name.

        "unknown" is left out if no client requested an unknown model.
        """
        return {
            name: counts.snapshot()
            for name, counts in self._counts.items()
            if name != UNKNOWN or counts.num_accepted
        }

    def submitted(self, requests: Sequence[Request]) -> None:
        """Count all choices of one request. Probes of the gateway are not counted."""
        first = requests[0]
        if first.user_id == PROBE:
            return
        name = self._models.get(first.model, UNKNOWN)
        counts, measure = self._counts[name], self._own.get(name, self._measure)
        call = _Call(len(requests))
        counts.num_accepted += len(requests)
        counts.num_choices.observe(len(requests))
        for request in requests:
            arrived_s = request.stamps.arrived_s
            self._open[request.key] = _Track(counts, call, request, measure, arrived_s)

    def delivered(self, item: Item | Forked) -> None:
        """Count an item that reached the sink. Items of probes are not counted."""
        if isinstance(item, Forked):
            self._fork(item)
            return
        key = item.key
        track = self._open.get(key)
        if track is None or not isinstance(item, TokenEvent | Answer):
            return
        now = self._now()
        _note_preemptions(track, item)
        num_tokens = item.num_tokens
        if num_tokens:
            self._take_tokens(track, item, num_tokens, now)
        if item.finish_reason is not None:
            del self._open[key]
            self._end(track, item, now)

    def _fork(self, forked: Forked) -> None:
        """Track the further choices that an operator of the graph made from choice 0."""
        track = self._open.get((forked.request_id, 0))
        if track is None:
            return
        for choice in range(forked.num_choices):
            key = forked.request_id, choice
            if key not in self._open:
                track.call.num_open += 1
                track.counts.num_accepted += 1
                self._open[key] = _Track(
                    track.counts, track.call, track.request, track.measure, track.arrived_s
                )

    def _take_tokens(
        self, track: _Track, item: TokenEvent | Answer, num_tokens: int, now: float
    ) -> None:
        """Count the tokens of an item, and the time since the previous item."""
        counts = track.counts
        # Only the engine that prefilled the prompt knows this; another may end the request.
        track.num_cached = max(track.num_cached, item.num_cached_tokens)
        if track.num_tokens:
            counts.itl.observe(now - track.last_s)
        else:
            track.first_s = _first_token_s(item, now)
            track.stamps = item.stamps
            counts.ttft.observe(track.first_s - track.arrived_s)
            counts.prompt_tokens += item.num_prompt_tokens
            counts.cached_tokens += item.num_cached_tokens
        track.num_tokens += num_tokens
        track.last_s = now
        counts.generation_tokens += num_tokens

    def _end(self, track: _Track, last: TokenEvent | Answer, now: float) -> None:
        """Count the end of a choice. `last`: its last item."""
        counts, call, reason = track.counts, track.call, last.finish_reason or "failed"
        counts.end(reason)
        if reason == "refused":
            code = last.code if isinstance(last, TokenEvent) else ""
            counts.reject(code, track.request.priority)
        stamps = last.stamps if last.stamps.started_s is not None else track.stamps
        counts.e2e.observe(now - track.arrived_s)
        if stamps.started_s is not None:
            counts.num_preemptions.observe(track.num_preemptions + track.preempted_here[1])
        finished_s = last.stamps.finished_s
        _observe_phases(counts, stamps, track.arrived_s, now if finished_s is None else finished_s)
        if track.num_tokens:
            self._end_answer(track, last, reason)
            if stamps.transferred_s is not None:
                num_moved = last.num_prompt_tokens + track.request.num_emitted
                counts.kv_transfer_bytes += track.measure.kv.num_bytes(num_moved)
                counts.kv_transfer_tokens += num_moved
        if isinstance(last, TokenEvent) and last.vector:  # the one event of a text
            counts.prompt_tokens += last.num_prompt_tokens
            counts.prompt_len.observe(last.num_prompt_tokens)
            counts.computed_len.observe(last.num_prompt_tokens)
        call.num_open -= 1
        call.longest = max(call.longest, track.num_tokens)
        if not call.num_open and call.longest:
            counts.longest_len.observe(call.longest)

    def _end_answer(self, track: _Track, last: TokenEvent | Answer, reason: str) -> None:
        """Count the end of a choice that has tokens: lengths, TPOT and goodput."""
        counts, num_tokens, request = track.counts, track.num_tokens, track.request
        counts.prompt_len.observe(last.num_prompt_tokens)
        counts.computed_len.observe(last.num_prompt_tokens - track.num_cached)
        counts.generation_len.observe(num_tokens)
        counts.max_tokens.observe(request.sampling.max_tokens)
        if num_tokens > 1:
            counts.tpot.observe((track.last_s - track.first_s) / (num_tokens - 1))
        ttft_s = track.first_s - track.arrived_s
        slo_s = track.measure.slo_ttft_s if request.slo_ttft_s is None else request.slo_ttft_s
        if reason in SERVED and (slo_s is None or ttft_s <= slo_s):
            counts.goodput_tokens += num_tokens


def _note_preemptions(track: _Track, item: TokenEvent | Answer) -> None:
    """Add an item's preemptions to those of previous engines."""
    # Each engine counts a request's preemptions from zero, so a smaller number or a new epoch
    # means another engine.
    epoch = item.epoch if isinstance(item, TokenEvent) else track.preempted_here[0]
    before_epoch, before = track.preempted_here
    if epoch != before_epoch or item.num_preemptions < before:
        track.num_preemptions += before
    track.preempted_here = epoch, item.num_preemptions


def _first_token_s(item: TokenEvent | Answer, now: float) -> float:
    """Return the time of the first token: for a whole answer, the end of its prefill."""
    drawn_s = item.stamps.prefilled_s
    return drawn_s if isinstance(item, Answer) and drawn_s is not None else now


def _observe_phases(counts: Counts, stamps: Stamps, arrived_s: float, finished_s: float) -> None:
    """Record the time of each phase that the request reached.

    All time before its start in an engine counts as queue time.
    """
    started_s, prefilled_s, phases = stamps.started_s, stamps.prefilled_s, counts.phases
    queue_s = (finished_s if started_s is None else started_s) - arrived_s
    phases["queue"].observe(queue_s)
    if started_s is None:
        return
    counts.queue.observe(queue_s)
    counts.inference.observe(finished_s - started_s)
    prefill_s = (finished_s if prefilled_s is None else prefilled_s) - started_s
    counts.prefill.observe(prefill_s)
    phases["prefill"].observe(prefill_s)
    if prefilled_s is None:
        return
    decoding_s = prefilled_s
    if stamps.transferred_s is not None:
        decoding_s = stamps.transferred_s
        counts.kv_transfer.observe(decoding_s - prefilled_s)
        phases["transfer"].observe(decoding_s - prefilled_s)
    counts.decode.observe(finished_s - decoding_s)
    phases["decode"].observe(finished_s - decoding_s)
