"""What the records of a load add up to."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil, floor
from typing import Any

import msgspec

from sagellm.load.sender import Record

SATURATED = 0.8  # of one core: above it the client, not the server, may be what was measured


class Spread(msgspec.Struct, frozen=True):
    """How one latency is spread, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Objective(msgspec.Struct, frozen=True):
    """What makes a request good: its TTFT, and its mean time a token behind the first (TPOT)."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def holds(self, record: Record) -> bool:
        """An unserved request is never good; one with a single token has no second figure."""
        if not record.is_ok:
            return False
        ttft_s, tpot_s = record.ttft_s, record.tpot_s
        is_prompt = self.ttft_s is None or (ttft_s is not None and ttft_s <= self.ttft_s)
        return is_prompt and (self.itl_s is None or tpot_s is None or tpot_s <= self.itl_s)


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met the objective: how many, what share of all, how many a second."""

    objective: Objective
    num_good: int
    ratio: float
    per_s: float


class Cost(msgspec.Struct, frozen=True):
    """What this client itself took: a client that is busy all the time measures itself."""

    cpu_s: float
    cpu_ratio: float  # of one core
    cpu_us_per_event: float | None
    num_open_peak: int

    @property
    def is_saturated(self) -> bool:
        return self.cpu_ratio > SATURATED


class Summary(msgspec.Struct, frozen=True):
    """Rates in requests or tokens a second. `offered` is what was planned (None in a closed loop:
    nothing is), `sent` what this client reached, `reached` what was answered.
    """

    elapsed_s: float
    num_sent: int
    num_ok: int
    num_failed: int
    errors: dict[str, int]
    num_refusals: int  # answers 429 and 503, those to retries included
    num_retries: int
    offered_per_s: float | None
    sent_per_s: float
    reached_per_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    tokens_per_event: float | None
    is_token_count_known: bool  # False: a server without usage; an event was taken for a token
    ttft_s: Spread | None
    itl_s: Spread | None
    tpot_s: Spread | None
    e2e_s: Spread | None
    lag_s: Spread | None
    goodput: Goodput | None
    client: Cost


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order, by linear interpolation between the two closest ranks."""
    at = (len(ordered) - 1) * share
    low, high = ordered[floor(at)], ordered[ceil(at)]
    return low + (high - low) * (at - floor(at))


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where there is no value."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Spread(sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def summarise(
    records: Sequence[Record],
    *,
    cpu_s: float,
    num_open_peak: int,
    objective: Objective | None = None,
    is_open_loop: bool = False,
) -> Summary:
    """Latencies are of the requests that were served; rates are over the time from the first
    request's plan to the last one's end.
    """
    served = [record for record in records if record.is_ok]
    start_s = min((record.planned_s for record in records), default=0.0)
    elapsed_s = max((record.ended_s for record in records), default=0.0) - start_s
    num_tokens = sum(record.num_tokens for record in served)
    num_events = sum(record.num_events for record in records)
    return Summary(
        elapsed_s=elapsed_s,
        num_sent=len(records),
        num_ok=len(served),
        num_failed=len(records) - len(served),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        num_refusals=sum(record.num_refusals for record in records),
        num_retries=sum(record.num_attempts - 1 for record in records),
        offered_per_s=_rate([record.planned_s for record in records]) if is_open_loop else None,
        sent_per_s=_rate([record.sent_s for record in records]),
        reached_per_s=_over(len(served), elapsed_s),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in served),
        completion_tokens=num_tokens,
        tokens_per_s=_over(num_tokens, elapsed_s),
        tokens_per_event=_share(num_tokens, sum(record.num_events for record in served)),
        is_token_count_known=all(record.completion_tokens is not None for record in served),
        **_latencies(served, records),
        goodput=_goodput(records, objective, elapsed_s) if objective is not None else None,
        client=Cost(
            cpu_s=cpu_s,
            cpu_ratio=_over(cpu_s, elapsed_s),
            cpu_us_per_event=_share(cpu_s * 1e6, num_events),
            num_open_peak=num_open_peak,
        ),
    )


def _latencies(served: Sequence[Record], records: Sequence[Record]) -> dict[str, Any]:
    return {
        "ttft_s": spread(record.ttft_s for record in served),
        "itl_s": spread(itl_s for record in served for itl_s in record.itl_s),
        "tpot_s": spread(record.tpot_s for record in served),
        "e2e_s": spread(record.e2e_s for record in served),
        "lag_s": spread(record.lag_s for record in records),
    }


def _goodput(records: Sequence[Record], objective: Objective, elapsed_s: float) -> Goodput:
    num_good = sum(objective.holds(record) for record in records)
    return Goodput(
        objective, num_good, _over(num_good, float(len(records))), _over(num_good, elapsed_s)
    )


def _rate(times_s: Sequence[float]) -> float:
    """Events a second, by the gaps between the first and the last."""
    return _over(len(times_s) - 1, max(times_s) - min(times_s)) if times_s else 0.0


def _over(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _share(count: float, of: int) -> float | None:
    return count / of if of else None
