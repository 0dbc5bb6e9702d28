"""The strategies of `route` that give each replica a score: by requests, or by measured speed."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from sagellm.operators.routing.prefix_aware import MOST_COMPARED
from sagellm.operators.routing.strategy import Candidates, Order
from sagellm.operators.routing.view import ReplicaView
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw

_LEAST_S = 1e-9  # shorter response times count as this one, as they have a logarithm


@dataclass(frozen=True, slots=True)
class LeastConnections:
    """The replica with the fewest requests; equal replicas take turns.

    Requests are counted by this router or as the engine reports them, the larger of both.

    Source: `least_conn` of nginx, LEASTCONN of HAProxy.
    """

    @property
    def initial(self) -> None:
        return None

    def score(self, replica: ReplicaView) -> float:
        return replica.num_requests

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        return candidates.lowest(), None


@dataclass(frozen=True, slots=True)
class LeastResponseTime:
    """The replica with the lowest product of response time and queue; equal replicas take turns.

        score = first_token_s * exp(-age / decay_s) * (requests of the replica + 1)

    `first_token_s` is the moving mean of the measured time from the queue to the first token, in
    which the latest request has weight 1/8. `age` is the time since the latest measurement: a
    replica that was slow is tried again. A cold replica, without a measurement, goes first while it
    has no request. Until its first token comes, it gets further requests only if all replicas with
    room are cold; then the least loaded replica goes first.

    The factor exp(-now / decay_s) is the same for all replicas, so a score changes only with its
    replica: the cost of a decision does not grow with the number of replicas.

    Sources: Peak EWMA of Finagle, without its peaks (latency times outstanding requests, decaying
    within 10 s); `least_time` of nginx.
    """

    decay_s: float = field(default=10.0, metadata={"min": 0.001})

    @property
    def subscribes(self) -> frozenset[str]:
        return frozenset({"first_token"})

    @property
    def initial(self) -> None:
        return None

    def score(self, replica: ReplicaView) -> float:
        """The logarithm of the score, without the factor that all replicas share."""
        speed, num_requests = replica.speed, replica.num_requests
        if speed.first_token_s is None:
            return math.inf if num_requests else -math.inf
        queue = max(speed.first_token_s, _LEAST_S) * (num_requests + 1)
        return math.log(queue) + speed.measured_s / self.decay_s

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        return candidates.lowest(), None


class _Prediction(NamedTuple):
    """The predicted latencies of a request at a replica, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class PredictedLatency:
    """The replica with the lowest predicted latency, by the measured speed of each replica.

        TTFT = time to compute the pending prompt tokens of the replica and the uncached tokens of
               the request, by a line fitted to the prefills of this replica
        TPOT = time of a step with one sequence more than the replica has, by a line fitted to the
               steps of this replica
        latency = TTFT + TPOT * min(max_tokens, expected_output_tokens)

    Replicas may differ in device, quantisation and kind of engine, as each is predicted by its own
    measurements. A cold replica, without any, goes first while it has no request, and last after
    that.

    For a request with a TTFT objective, the headroom decides: what is left of an objective after
    the prediction, as a share of the objective. The headrooms of TTFT and TPOT are summed with the
    weights `ttft_weight` and 1 - `ttft_weight`; that of TTFT counts alone if there is no
    `slo_tpot_s`. Among replicas that meet the objectives, the least sum goes first, so that fast
    replicas stay free for strict requests. Replicas that miss one follow: idle ones, then those
    that miss TPOT alone, TTFT alone, both; in each group the greatest sum first.

    A decision compares at most 34 replicas: the one with the lowest predicted latency for a prompt
    of mean length, the least loaded, the 16 with the longest cached prefix, and 16 others, which
    change with each request. So pools of up to 16 replicas are compared completely, and the cost of
    a decision is bounded for larger ones.

    Sources: Algorithm 1 of Mooncake (the prefill replica with the least queueing and prefill time);
    headroom, its weights and groups of llm-d's predicted-latency scorer, which scales headrooms by
    their range over the replicas, not by the objective.
    """

    slo_tpot_s: float | None = field(default=None, metadata={"min": 1e-6})
    ttft_weight: float = field(default=0.8, metadata={"min": 0.0, "max": 1.0})
    expected_output_tokens: int = field(default=64, metadata={"min": 1})

    @property
    def subscribes(self) -> frozenset[str]:
        return frozenset({"cache", "first_token"})

    @property
    def initial(self) -> None:
        return None

    def score(self, replica: ReplicaView) -> float:
        """The predicted latency of a request of mean length, in seconds."""
        speed, num_requests = replica.speed, replica.num_requests
        if not speed.is_known:
            return math.inf if num_requests else -math.inf
        mean_len = speed.prefills.tokens / speed.prefills.weight if speed.prefills.weight else 0.0
        predicted = _predicted(replica, mean_len)
        return predicted.ttft_s + predicted.tpot_s * self.expected_output_tokens

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, None]:
        first, mask = candidates.lowest(), candidates.mask
        if not candidates.speed(first).is_known:  # idle, or all candidates are cold
            return first, None
        compared = dict.fromkeys((first, candidates.least_loaded()))
        compared.update(dict.fromkeys(candidates.warm(candidates.cached, mask, MOST_COMPARED)))
        compared.update(dict.fromkeys(candidates.some(mask, MOST_COMPARED)))

        def rank(number: int) -> tuple[int, float, int]:
            return *self._rank(candidates, number, now), candidates.distance(number)

        return sorted(compared, key=rank), None

    def _rank(self, candidates: Candidates, number: int, now: float) -> tuple[int, float]:
        """The group of a replica, and its place in the group; the lowest goes first."""
        request, replica = candidates.request, candidates.pool.replicas[number]
        if not replica.speed.is_known:
            return 5, candidates.load(number)
        predicted = _predicted(replica, candidates.num_uncached_tokens(number))
        if request.slo_ttft_s is None:
            num_output = min(request.sampling.max_tokens, self.expected_output_tokens)
            return 0, predicted.ttft_s + predicted.tpot_s * num_output
        return self._headroom_rank(predicted, request, now, is_idle=not replica.num_requests)

    def _headroom_rank(
        self, predicted: _Prediction, request: Request, now: float, *, is_idle: bool
    ) -> tuple[int, float]:
        assert request.slo_ttft_s is not None
        left_s = request.slo_ttft_s - max(now - request.stamps.arrived_s, 0.0)
        ttft = (left_s - predicted.ttft_s) / max(request.slo_ttft_s, _LEAST_S)
        tpot, headroom = 0.0, ttft
        if self.slo_tpot_s is not None:
            tpot = 1 - predicted.tpot_s / self.slo_tpot_s
            headroom = self.ttft_weight * ttft + (1 - self.ttft_weight) * tpot
        if ttft >= 0 and tpot >= 0:
            return 0, headroom
        if is_idle:
            return 1, -headroom
        return (2 if ttft >= 0 else 3 if tpot >= 0 else 4), -headroom


def _predicted(replica: ReplicaView, num_uncached: float) -> _Prediction:
    """The prediction for a prompt with so many uncached tokens. What was not measured counts 0."""
    speed = replica.speed
    ttft_s = speed.prefill_s(replica.num_pending + num_uncached)
    if ttft_s is None:
        ttft_s = speed.first_token_s or 0.0
    return _Prediction(ttft_s, speed.step_s(replica.num_requests + 1) or 0.0)
