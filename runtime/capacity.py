"""The capacity of an engine's replicas, learned from feedback: what they do, and how fast."""

import math
from collections.abc import Mapping

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.forecast import LineFit
from sagellm.runtime.port import EngineFacts, EngineLoad

_MEMORY_S = 600.0  # the time after which the weight of a sample has fallen to 1/e
_MIN_SERVED = 8.0  # served requests before the first estimate
_STEP_WEIGHT = 1 / 8  # weight of the latest steps in the moving mean of a replica
_RATE_WEIGHT = 1 / 8  # weight of the latest interval in the rate of served requests
_FADE = 1 - 1 / 256  # factor on the weight of earlier steps and first tokens, with each new one
_MUCH = 0.5  # the share of leased blocks from which on those of a sequence are measured
FULL = 0.95  # the share of leased blocks at which a pool counts as full


class ReplicaWork(msgspec.Struct, frozen=True):
    """The work of one replica. `num_open`: sequences that run or wait in it, as last reported.

    `sequence_s`: the sum over this interval of the time that each sequence was open, up to `at_s`.
    `step_s`: the moving mean of the time of its steps. `down_s`: since when it is lost or ejected.
    """

    num_open: int = 0
    at_s: float = 0.0
    sequence_s: float = 0.0
    step_s: float | None = None
    num_steps: int = 0
    leased: float = 0.0  # the share of blocks
    down_s: float | None = None

    def after(self, load: EngineLoad, now: float) -> "ReplicaWork":
        """The work with one more report of the load."""
        num_steps, seconds = load.num_steps - self.num_steps, now - self.at_s
        step_s = self.step_s
        if num_steps > 0 and seconds > 0 and self.num_open:  # else idle time would count
            latest_s = seconds / num_steps
            step_s = latest_s if step_s is None else step_s + _STEP_WEIGHT * (latest_s - step_s)
        return ReplicaWork(
            load.num_running + load.num_waiting,
            now,
            self.sequence_s + self.num_open * seconds,
            step_s,
            load.num_steps,
            load.num_leased_blocks / load.num_blocks if load.num_blocks else 0.0,
            self.down_s,
        )

    def closed(self, now: float) -> "ReplicaWork":
        """The work at the begin of an interval."""
        return replace(self, at_s=now, sequence_s=0.0)

    def marked(self, now: float, *, is_up: bool) -> "ReplicaWork":
        """The work of a replica that is up again, or was lost with all its sequences."""
        if is_up:
            return replace(self, down_s=None)
        open_s = self.num_open * (now - self.at_s)
        down_s = now if self.down_s is None else self.down_s
        sequence_s = self.sequence_s + open_s
        return replace(self, num_open=0, at_s=now, sequence_s=sequence_s, down_s=down_s)


class PoolWork(msgspec.Struct, frozen=True):
    """The work of all replicas of one engine, and what was learned from it. Immutable.

    `residence`: the time of a sequence in the engine, by sequences open in its replica: by Little's
    law, replicas with N open sequences each serve N / residence(N) requests a second. `steps`: the
    time of a step, and `first_tokens` the time from the queue to the first token, by the same.
    `num_begun`: open sequences at the begin of the interval.
    `share`: leased blocks of a sequence, as a share of a replica's. `num_served`: in this interval.
    `served_per_s`: a moving mean. `credit`: the most requests of a replica, by operator.
    """

    replicas: Map[int, ReplicaWork] = Map()
    begun_s: float = 0.0
    num_begun: int = 0
    num_served: int = 0
    served_per_s: float = 0.0
    mean_open: float = 0.0  # open sequences of all replicas, in the last interval
    residence: LineFit = LineFit()
    steps: LineFit = LineFit()
    first_tokens: LineFit = LineFit()
    share: float = 0.0
    max_num_seqs: float = math.inf
    credit: Mapping[str, float] = {}

    @classmethod
    def opened(cls, num_replicas: int, facts: EngineFacts | None) -> "PoolWork":
        """The work of an engine that has just been opened."""
        replicas = Map({number: ReplicaWork() for number in range(num_replicas)})
        return cls(replicas, max_num_seqs=math.inf if facts is None else facts.max_num_seqs)

    # ---- feedback ----------------------------------------------------------------------------

    def with_load(self, number: int, load: EngineLoad, now: float) -> "PoolWork":
        """The work with a report of the load of a replica."""
        before = self.replicas.get(number)
        if before is None:
            return self
        after, steps, share = before.after(load, now), self.steps, self.share
        num_steps, seconds = load.num_steps - before.num_steps, now - before.at_s
        if num_steps > 0 and seconds > 0 and before.num_open:
            num_rows = num_steps * before.num_open
            steps = steps.with_samples(num_rows, seconds, count=num_steps, kept=_FADE**num_steps)
        # While blocks are plenty, reserved ones may be more than those of the open sequences.
        if after.num_open and after.leased >= _MUCH:
            each = after.leased / after.num_open
            share = each if not share else share + _STEP_WEIGHT * (each - share)
        return replace(self, replicas=self.replicas.set(number, after), steps=steps, share=share)

    def with_credit(self, node: str, num_requests: float) -> "PoolWork":
        """The work of an engine whose operator `node` takes so many requests of a replica."""
        return replace(self, credit={**self.credit, node: num_requests})

    def with_first_token(self, number: int, seconds: float) -> "PoolWork":
        """The work with a first token, `seconds` after its request left the queue."""
        known = self.replicas.get(number)
        num_open = max(known.num_open if known is not None else 1, 1)
        fit = self.first_tokens.with_samples(num_open, seconds, kept=_FADE)
        return replace(self, first_tokens=fit)

    def with_served(self) -> "PoolWork":
        """The work with one more request that a replica has served."""
        return replace(self, num_served=self.num_served + 1)

    def with_health(self, number: int, now: float, *, is_up: bool) -> "PoolWork":
        """The work after a replica was lost, or is up."""
        known = self.replicas.get(number)
        if known is None:
            return self
        return replace(self, replicas=self.replicas.set(number, known.marked(now, is_up=is_up)))

    def with_replicas(self, present: frozenset[int], now: float) -> "PoolWork":
        """The work of these replicas. New ones are down until they are reported as up."""
        kept = {number: one for number, one in self.replicas.items() if number in present}
        new = {
            number: ReplicaWork(at_s=now, down_s=now) for number in present if number not in kept
        }
        return replace(self, replicas=Map({**kept, **new}))

    def closed(self, now: float) -> "PoolWork":
        """The work at the begin of an interval, with what was learned in the one before."""
        seconds = now - self.begun_s
        works = self.replicas.items()
        replicas = Map({number: one.closed(now) for number, one in works})
        sequence_s = sum(one.sequence_s + one.num_open * (now - one.at_s) for _, one in works)
        residence, num_up = self.residence, max(self.num_up, 1)
        mean_open, num_served = sequence_s / seconds, self.num_served
        # The mean of the sequences that came and went: their number may have risen or fallen.
        num_passed = num_served + (self.num_open - self.num_begun) / 2
        if num_served and num_passed > 0:
            kept = math.exp(-seconds / _MEMORY_S)
            each = mean_open / num_up * num_passed
            residence = residence.with_samples(each, sequence_s, count=num_passed, kept=kept)
        per_s = self.served_per_s + _RATE_WEIGHT * (num_served / seconds - self.served_per_s)
        return replace(
            self,
            replicas=replicas,
            begun_s=now,
            num_begun=self.num_open,
            num_served=0,
            served_per_s=per_s,
            mean_open=mean_open,
            residence=residence,
        )

    def resumed(self, now: float) -> "PoolWork":
        """The work with an interval that begins now, after a time without work."""
        works = self.replicas.items()
        replicas = Map({number: one.closed(now) for number, one in works})
        num_begun = self.num_open
        return replace(self, replicas=replicas, begun_s=now, num_begun=num_begun, num_served=0)

    # ---- what follows from it ----------------------------------------------------------------

    @property
    def num_present(self) -> int:
        """The replicas that were not removed, up or not."""
        return len(self.replicas)

    @property
    def num_up(self) -> int:
        return sum(one.down_s is None for one in self.replicas.values())

    @property
    def num_open(self) -> int:
        """The open sequences of all replicas, as last reported."""
        return sum(one.num_open for one in self.replicas.values())

    @property
    def is_full(self) -> bool:
        """Whether every replica that is up has leased nearly all of its blocks."""
        up = [one for one in self.replicas.values() if one.down_s is None]
        return bool(up) and all(one.leased >= FULL for one in up)

    def is_crowded(self, ttft_s: float) -> bool:
        """Whether first tokens come later than `ttft_s` because too many sequences are open."""
        most = _most_within(self.first_tokens, ttft_s)
        return 1.0 <= most < self.mean_open / max(self.num_up, 1)

    def is_slow(self, tpot_s: float) -> bool:
        """Whether the steps of every replica that is up take longer than `tpot_s`."""
        up = [one for one in self.replicas.values() if one.down_s is None and one.num_open]
        return bool(up) and all((one.step_s or 0.0) > tpot_s for one in up)

    def most_open(self, ttft_s: float | None, tpot_s: float | None) -> float:
        """The most sequences that a replica may have open: as fit its batch and its blocks, and
        within the objectives. At least 1; infinite if nothing bounds them.
        """
        by_blocks = FULL / self.share if self.share else math.inf
        return max(
            1.0,
            min(
                self.max_num_seqs,
                sum(self.credit.values()) or math.inf,
                by_blocks,
                _most_within(self.first_tokens, ttft_s),
                _most_within(self.steps, tpot_s),
            ),
        )

    def served_at(self, num_open: float) -> float | None:
        """The requests a second that a replica serves with so many open sequences; None if unknown.

        Where all samples had about as many open sequences, more of them count as no slower.
        """
        if self.residence.weight < _MIN_SERVED or math.isinf(num_open):
            return None
        seconds = self.residence.seconds_of(num_open, through_origin=False)
        return num_open / seconds if seconds > 0 else None


def _most_within(fit: LineFit, bound_s: float | None) -> float:
    """The most open sequences at which the line is within a bound; infinite if none is known."""
    if bound_s is None or fit.weight < _MIN_SERVED:
        return math.inf
    at_none_s, at_one_s = (fit.seconds_of(count, through_origin=False) for count in (0.0, 1.0))
    each_s = at_one_s - at_none_s
    return (bound_s - at_none_s) / each_s if each_s > 0 else math.inf
