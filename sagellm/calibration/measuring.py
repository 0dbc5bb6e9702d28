"""Measures an engine inside a real session: prompts, batches of decodes, and a mixed load."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import psutil
import trio

from sagellm.calibration.fitting import Measured
from sagellm.calibration.recording import MeasuredStep, RecordedEngine, StepLog
from sagellm.runtime.sampling import Sampling
from sagellm.session import Session

_LOADS = (0.3, 0.6, 0.9)  # of what the engine served in the first mixed load
_NUM_MIXED = 40  # requests of one mixed load
_MOST_OUTPUT = 64  # tokens
_NUM_DECODED = 16  # steps in which all sequences of a batch decode
_PERIOD_S = 0.5  # the clocks of CPUs tick every 10 ms
_MOST_OTHERS = 0.08  # CPUs
_FEWEST = 0.25  # of the time: with less, some sizes would be missing
_MOST_TRIES = 3  # times the asked time, while other programs disturb


@dataclass(frozen=True, slots=True)
class Sizes:
    """The limits of an engine. `longest`: the tokens of a prompt with its answer. `num_tokens`: of
    the pool. `step_tokens`: the most tokens of a step.
    """

    longest: int
    num_tokens: int
    step_tokens: int
    max_num_seqs: int
    vocab_size: int


class Planned(NamedTuple):
    """A request that is sent `at_s` seconds after the beginning of its cell."""

    at_s: float
    prompt: tuple[int, ...]
    output_len: int


class MeasuredRequest(NamedTuple):
    """One request: when it was sent, when its first step was launched and had ended, and when its
    first token was read. `num_rows`: the sequences of that step. `is_alone`: no other request was
    sent with it.
    """

    prompt_len: int
    sent_s: float
    started_s: float
    sampled_s: float
    read_s: float
    num_rows: int
    is_alone: bool


class MeasuredPeriod(NamedTuple):
    """Consecutive cells. `others`: the CPUs that other programs used meanwhile."""

    steps: list[MeasuredStep]
    requests: list[MeasuredRequest]
    others: float
    seconds: float


@dataclass(slots=True)
class Measurement:
    """The measured steps and requests, in order."""

    periods: list[MeasuredPeriod] = field(default_factory=list)

    @property
    def quiet_s(self) -> float:
        """The seconds of the periods that other programs did not disturb."""
        return sum(one.seconds for one in self.periods if one.others <= _MOST_OTHERS)

    @property
    def quiet(self) -> list[MeasuredPeriod]:
        """The periods that other programs did not disturb; all periods if these are few."""
        total_s = sum(period.seconds for period in self.periods)
        if self.quiet_s < _FEWEST * total_s:
            return self.periods
        return [period for period in self.periods if period.others <= _MOST_OTHERS]

    @property
    def steps(self) -> list[Measured]:
        """The steps of quiet periods, and their seconds."""
        return [(step.shape, step.seconds) for period in self.quiet for step in period.steps]

    @property
    def requests(self) -> list[MeasuredRequest]:
        """The requests of quiet periods."""
        return [request for period in self.quiet for request in period.requests]

    @property
    def others(self) -> float:
        """The CPUs that other programs used in the periods that count."""
        counted = self.quiet
        return sum(one.others * one.seconds for one in counted) / sum(
            one.seconds for one in counted
        )


class Cells:
    """The requests of designed cells. No two prompts are equal, unless a cell says so."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._sizes = sizes
        self._draw = Random(f"{seed}/calibration")

    def warm_up(self) -> Iterator[list[Planned]]:
        """Prompts that write every block of the pool: memory is slow when first written."""
        for _ in range(-(-self._sizes.num_tokens // self._sizes.longest)):
            yield [self._planned(self._sizes.longest - 1, 1)]

    def round(self) -> list[list[Planned]]:
        """Prompts alone and batches of decodes, of all sizes, in random order."""
        cells = [*self._prompts(), *self._batches()]
        self._draw.shuffle(cells)
        return cells

    def burst(self) -> list[Planned]:
        """More requests at once than the engine has slots, which the pool can hold."""
        most = self._sizes.max_num_seqs
        longest = max(1, self._sizes.num_tokens // most - 2 * _MOST_OUTPUT)
        longest_output = max(1, min(2 * _MOST_OUTPUT, self._sizes.longest // 2))
        return [
            self._planned(self._length(1, 2 * longest), self._length(1, longest_output))
            for _ in range(most + most // 2)
        ]

    def mixed(self, gap_s: float) -> list[Planned]:
        """Random lengths at the times of a Poisson process; a third continues an earlier prompt."""
        found: list[Planned] = []
        at_s = 0.0
        for _ in range(_NUM_MIXED):
            at_s += self._draw.expovariate(1 / gap_s) if gap_s else 0.0
            output_len = self._length(1, max(1, min(_MOST_OUTPUT, self._sizes.longest // 4)))
            planned = self._planned(self._length(1, self._sizes.longest // 2), output_len, at_s)
            if found and self._draw.random() < 1 / 3:
                most = max(1, self._sizes.longest // 4)
                prompt = self._draw.choice(found).prompt[: most - 1] + planned.prompt[:most]
                planned = planned._replace(prompt=prompt)
            found.append(planned)
        return found

    def _prompts(self) -> Iterator[list[Planned]]:
        for length in powers(8, self._sizes.longest - 1):
            for _ in range(2):
                yield [self._planned(length + self._draw.randrange(length // 2 + 1), 1)]

    def _batches(self) -> Iterator[list[Planned]]:
        """Sequences that decode together: answers are longer than the prompts take to compute."""
        longest = self._sizes.longest // 2
        for batch in powers(1, self._sizes.max_num_seqs):
            for context in powers(16, max(16, longest), 4):
                output_len = _NUM_DECODED + batch * context // self._sizes.step_tokens
                is_fitting = batch * (context + output_len) <= self._sizes.num_tokens * 3 // 4
                if is_fitting and context + output_len <= self._sizes.longest:
                    yield [self._planned(context, output_len) for _ in range(batch)]

    def _planned(self, length: int, output_len: int, at_s: float = 0.0) -> Planned:
        length = max(1, min(length, self._sizes.longest - output_len))
        prompt = self._draw.choices(range(self._sizes.vocab_size), k=length)
        return Planned(at_s, tuple(prompt), output_len)

    def _length(self, low: int, high: int) -> int:
        """A length whose logarithm is uniform."""
        ratio: float = (max(low, high) / low) ** self._draw.random()
        return round(low * ratio)


def powers(low: int, high: int, factor: int = 2) -> Iterator[int]:
    """`low`, `low` * `factor`, ..., and `high`."""
    while low < high:
        yield low
        low *= factor
    yield high


async def measure(
    session: Session,
    engine: RecordedEngine,
    sizes: Sizes,
    *,
    spend_s: float,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Measurement:
    """Measure for about `spend_s` seconds, at least one round of all cells; longer while other
    programs use the CPUs. `progress` is called with the share of the time that is over.
    """
    cells, player = Cells(sizes, seed), CellPlayer(session, engine.log)
    for cell in cells.warm_up():
        await player.play(cell)
    busy_s = await player.play(cells.mixed(0.0))
    found, is_over = Measurement(), False
    began_s = trio.current_time()
    player.take()
    while not is_over:
        loads = [cells.mixed(busy_s / _NUM_MIXED / load) for load in _LOADS]
        for cell in (*cells.round(), *loads, cells.burst()):
            await player.play(cell)
            if player.period_s >= _PERIOD_S:
                found.periods.append(player.take())
            share = max(found.quiet_s, (trio.current_time() - began_s) / _MOST_TRIES) / spend_s
            progress(min(share, 1.0))
        is_over = share >= 1.0
    found.periods.append(player.take())
    return found


def others_cpu_s() -> float:
    """The CPU seconds that other programs have used since the machine started."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    guest_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user and nice
    own = os.times()
    return float(sum(times) - idle_s - guest_s - own.user - own.system)


class CellPlayer:
    """Sends cells into a session, and records their steps and requests in periods."""

    def __init__(self, session: Session, log: StepLog) -> None:
        self._session = session
        self._log = log
        self._requests: list[MeasuredRequest] = []
        self._began_s = trio.current_time()
        self._others_s = others_cpu_s()

    @property
    def period_s(self) -> float:
        """The age of the period in seconds."""
        return trio.current_time() - self._began_s

    def take(self) -> MeasuredPeriod:
        """The period until now. The next one begins."""
        period_s, others_s = self.period_s, others_cpu_s()
        others = max(0.0, others_s - self._others_s) / period_s
        period = MeasuredPeriod(self._log.take(), self._requests, others, period_s)
        self._requests, self._began_s, self._others_s = [], trio.current_time(), others_s
        return period

    async def play(self, cell: Sequence[Planned]) -> float:
        """Send the requests of a cell, each at its time; return the seconds until all ended."""
        began_s = trio.current_time()

        async def send(planned: Planned) -> None:
            await trio.sleep_until(began_s + planned.at_s)
            await self._ask(planned, is_alone=len(cell) == 1)

        async with trio.open_nursery() as nursery:
            for planned in cell:
                nursery.start_soon(send, planned)
        return trio.current_time() - began_s

    async def _ask(self, planned: Planned, *, is_alone: bool) -> None:
        sampling = Sampling(max_tokens=planned.output_len, ignore_eos=True)
        sent_s = trio.current_time()
        async with self._session.stream(planned.prompt, sampling=sampling) as stream:
            first = await anext(stream)
            read_s = trio.current_time()
            async for _ in stream:
                pass
        started_s, sampled_s = first.stamps.started_s, first.stamps.prefilled_s
        if started_s is not None and sampled_s is not None:
            step = self._log.step_before(sampled_s)
            times = sent_s, started_s, step.ended_s, read_s
            measured = MeasuredRequest(len(planned.prompt), *times, step.shape.num_rows, is_alone)
            self._requests.append(measured)
