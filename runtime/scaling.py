"""The rule of autoscaling: how many replicas an engine needs, and when their number may change.

After the planner of Dynamo: a predicted lower bound, and a load loop of one replica at a time with
a check before each removal. The window of a removal is the stabilization window of Kubernetes'
HorizontalPodAutoscaler; it grows where removals were regretted, as route flap damping does.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from sagellm.graphs.sections import ReplicaBounds
from sagellm.runtime.capacity import PoolWork

_MOST_REGRETS = 3  # the window of a removal grows up to 2**3 times
_REGRET_WINDOWS = 4  # a replica that is needed within so many cool-downs was removed too early
_FORGIVEN_WINDOWS = 16  # after so many cool-downs without a regret, earlier ones are forgotten
_MOST_FAILURES = 5  # the pause after failed starts grows up to 2**5 times
_PATIENCE = 2.0  # starts: how long a lost replica may take to come back before another is added


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """The objectives and the thresholds of a rule. Times are in seconds.

    `target_load`: the share of their capacity that replicas shall serve. `removal_load`: the share
    that the others may serve after a removal. `cool_down_s`: how long a removal must have been
    possible. `retry_s`: the pause after a failed start.
    """

    slo_ttft_s: float | None
    slo_tpot_s: float | None
    target_load: float
    removal_load: float
    interval_s: float
    cool_down_s: float
    retry_s: float


class Need(NamedTuple):
    """The replicas that an engine needs at least. It gets more if fewer than `up` serve, for
    `reason`; none is removed while `keep` are needed.
    """

    up: int
    reason: str
    keep: int


class Signs(NamedTuple):
    """The measurements of an engine: the predicted requests a second; the predicted time until
    requests that wait have left the queue; whether first tokens come too late because of this
    engine; the number of requests that wait; and how long a replica takes to start.
    """

    per_s: float
    wait_s: float
    is_late: bool
    num_waiting: float = 0.0
    start_s: float = 0.0


def need_of(pool: PoolWork, signs: Signs, bounds: ReplicaBounds, rule: ScalingRule) -> Need:
    """The replicas that an engine needs, by its predicted demand and by its load."""
    most_open = pool.most_open(rule.slo_ttft_s, rule.slo_tpot_s)
    per_replica = bounds.requests_per_s or pool.served_at(most_open)
    num_up = max(pool.num_up, 1)
    up, reason, keep = 1, "demand", 1
    if per_replica:
        late_per_s = _left_per_s(signs, num_up * per_replica, rule)
        up = _fitting(signs.per_s + late_per_s, per_replica * rule.target_load)
        keep = _fitting(signs.per_s, per_replica * rule.removal_load)
    if math.isfinite(most_open):
        num_open = max(pool.mean_open, pool.num_open)
        keep = max(keep, _fitting(num_open, most_open * rule.removal_load))
    if found := _overload(pool, signs, rule):
        keep = max(keep, num_up)
        if up <= num_up:
            up, reason = num_up + 1, found
    if _would_be_late(signs.wait_s, num_up, rule):
        keep = max(keep, num_up)
    return Need(up, reason, max(keep, up))


def _left_per_s(signs: Signs, served_per_s: float, rule: ScalingRule) -> float:
    """The rate at which to serve those that still wait when a new replica is ready, in requests a
    second: within `cool_down_s`, for which that replica stays in any case.
    """
    if not signs.num_waiting:
        return 0.0
    num_left = signs.num_waiting + (signs.per_s - served_per_s) * signs.start_s
    return max(num_left, 0.0) / max(rule.cool_down_s, rule.interval_s)


def _fitting(amount: float, each: float) -> int:
    """The least number of replicas that are enough, where each takes less than `each`."""
    return max(math.ceil(amount / each - 1e-9), 1)


def _overload(pool: PoolWork, signs: Signs, rule: ScalingRule) -> str:
    """Why the replicas are too few for the load that they have; empty if they are not."""
    if signs.is_late or (rule.slo_ttft_s is not None and pool.is_crowded(rule.slo_ttft_s)):
        return "ttft"
    if rule.slo_tpot_s is not None and pool.is_slow(rule.slo_tpot_s):
        return "tpot"
    return "kv" if pool.is_full and signs.wait_s > 0 else ""


def _would_be_late(wait_s: float, num_up: int, rule: ScalingRule) -> bool:
    """Whether requests would wait too long with one replica less."""
    if num_up < 2 or wait_s <= 0:
        return wait_s > 0
    bound_s = rule.interval_s if rule.slo_ttft_s is None else rule.slo_ttft_s
    return wait_s * num_up / (num_up - 1) >= bound_s * rule.removal_load


class ScalingChange(NamedTuple):
    """A change of the number of replicas."""

    num_replicas: int
    reason: str


class EngineScaling(msgspec.Struct, frozen=True):
    """The changes of one engine's replicas. Immutable.

    `pending_s`: since when a change is under way; no other change begins before its end. `is_more`:
    whether that change adds replicas. `start_s`: how long replicas take to start. `needs`: (time,
    replicas that must be kept) of the decisions since `since_s`; older ones of which a later one is
    as high are left out. `num_regrets`: how often a removal was followed by a need for more.
    """

    start_s: float
    since_s: float = 0.0
    pending_s: float | None = None
    is_more: bool = False
    needs: tuple[tuple[float, int], ...] = ()
    removed_s: float = -math.inf
    regretted_s: float = -math.inf
    num_regrets: int = 0
    num_failures: int = 0
    retry_at_s: float = -math.inf

    def decide(
        self, pool: PoolWork, need: Need, bounds: ReplicaBounds, rule: ScalingRule, now: float
    ) -> "tuple[EngineScaling, ScalingChange | None]":
        """The scaling after a decision, and the change that begins now, if any."""
        noted = self._noted(need, rule, now)
        if self.pending_s is not None or now < self.retry_at_s:
            return noted, None
        change = noted._change(pool, need, bounds, rule, now)
        if change is None:
            return noted, None
        return noted._begun(change.num_replicas > pool.num_present, rule, now), change

    def ended(self, error: str, rule: ScalingRule, now: float) -> "EngineScaling":
        """The scaling after the end of the change that was under way. A failed change is tried
        again after a pause, which doubles with each failure in a row.
        """
        if error:
            pause_s = rule.retry_s * 2 ** min(self.num_failures, _MOST_FAILURES)
            return replace(
                self,
                pending_s=None,
                num_failures=self.num_failures + 1,
                retry_at_s=now + pause_s,
            )
        if not self.is_more or self.pending_s is None:
            return replace(self, pending_s=None, num_failures=0)
        return replace(
            self,
            pending_s=None,
            num_failures=0,
            start_s=(self.start_s + now - self.pending_s) / 2,
            since_s=now,  # what was kept before this start says little of what is needed after it
        )

    def window_s(self, rule: ScalingRule) -> float:
        """How long fewer replicas must have been enough before one is removed."""
        return float(rule.cool_down_s * 2**self.num_regrets)

    def _noted(self, need: Need, rule: ScalingRule, now: float) -> "EngineScaling":
        """The scaling that remembers what must be kept now."""
        oldest_s = now - self.window_s(rule)
        kept = tuple(one for one in self.needs if one[0] >= oldest_s and one[1] > need.keep)
        return replace(self, needs=(*kept, (now, need.keep)))

    def _change(
        self, pool: PoolWork, need: Need, bounds: ReplicaBounds, rule: ScalingRule, now: float
    ) -> ScalingChange | None:
        count, num_up = pool.num_present, pool.num_up
        if not bounds.min <= count <= bounds.max:
            kept = min(max(count, bounds.min), bounds.max)
            return ScalingChange(kept, "bounds")
        if need.up > num_up and count < bounds.max:
            most = self._most_added(pool, bounds, now)
            added = min(need.up - num_up, bounds.max - count, most)
            return ScalingChange(count + added, need.reason) if added > 0 else None
        if now - self.since_s < self.window_s(rule) or count == bounds.min:
            return None
        most_needed = max(number for _, number in self.needs)
        # A replica that is down may go at once: the others have served without it.
        num_after = num_up if num_up < count else num_up - 1
        return ScalingChange(count - 1, "idle") if most_needed <= num_after else None

    def _most_added(self, pool: PoolWork, bounds: ReplicaBounds, now: float) -> int:
        """The number of replicas that may be added. A replica that is down is given time to come
        back; if it does not, one is added in its place. While two are down, more of them would be
        of no use.
        """
        down = [one.down_s for one in pool.replicas.values() if one.down_s is not None]
        if not down:
            return bounds.max
        is_late = now - down[0] > _PATIENCE * max(self.start_s, 1.0)
        return 1 if len(down) == 1 and is_late else 0

    def _begun(self, is_more: bool, rule: ScalingRule, now: float) -> "EngineScaling":
        """The scaling with a change that begins now."""
        scaling = replace(self, pending_s=now, is_more=is_more)
        if not is_more:
            is_forgiven = now - self.regretted_s > _FORGIVEN_WINDOWS * rule.cool_down_s
            return replace(
                scaling, removed_s=now, num_regrets=0 if is_forgiven else self.num_regrets
            )
        if now - self.removed_s > _REGRET_WINDOWS * self.window_s(rule):
            return scaling
        num_regrets = min(self.num_regrets + 1, _MOST_REGRETS)
        return replace(scaling, num_regrets=num_regrets, regretted_s=now)
