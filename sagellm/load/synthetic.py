"""Synthetic workloads: arrivals, lengths, users and shared prefixes, sampled from distributions.

The text form is `synthetic:rate=8,arrivals=gamma,cv=2,input=lognormal:1000:0.8,requests=5000`.
Equal texts give equal requests, also on another machine.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import count, islice, takewhile
from pathlib import Path
from random import Random
from typing import Any

from sagellm.graphs.vocabulary import nearest
from sagellm.load.traces import BLOCK_LEN, PlannedRequest, TraceError, read_priority, read_trace
from sagellm.runtime.messages import NORMAL

PREFIX = "synthetic:"
_FIX = "docs/serving.md lists the keys of a synthetic workload"
ARRIVALS = ("poisson", "gamma", "diurnal", "constant")
# Keys that have an effect only beside another key, or for one kind of arrivals.
_ONLY_FOR = {"cv": "gamma", "period_s": "diurnal", "amplitude": "diurnal"}
_ONLY_WITH_PREFIXES = ("prefix_len", "zipf")
_POSITIVE = ("rate", "cv", "period_s", "requests", "seconds", "slo_ttft_s", "prefixes")


@dataclass(frozen=True, slots=True)
class SyntheticWorkload:
    """The distributions of a synthetic workload. Its fields are the keys of the text form.

    `rate`: mean requests a second. `cv`: coefficient of variation of the gaps of gamma arrivals;
    above 1, requests come in bursts. Diurnal arrivals have the rate
    rate * (1 + amplitude * sin(2 pi t / period_s)). `input` and `output`: distributions of lengths,
    as `lognormal:1000:0.8`. `users`, `priorities`, `models` and `budgets`: values with weights, as
    `high:1+normal:9`. Each prompt begins with one of `prefixes` shared prefixes of `prefix_len`
    tokens, before its own `input` tokens; prefix k has the weight 1 / k**zipf.
    """

    rate: float = 1.0
    arrivals: str = "poisson"
    cv: float = 1.0
    period_s: float = 86_400.0
    amplitude: float = 0.5
    input: str = "128"
    output: str = "64"
    requests: int = 0  # 0: 1,000, or any number within `seconds`
    seconds: float = math.inf
    users: str = ""
    priorities: str = ""
    models: str = ""
    budgets: str = ""
    slo_ttft_s: float | None = None
    prefixes: int = 0
    prefix_len: int = BLOCK_LEN
    zipf: float = 1.0
    seed: int = 0

    def generate(self) -> Iterator[PlannedRequest]:
        """The requests, sorted by time. Raises TraceError, OSError for an empirical length."""
        lengths = [self._sampled("input"), self._sampled("output")]
        users, models = self._weighted("users"), self._weighted("models")
        priorities, prefix = self._weighted("priorities"), self._prefixes()
        budgets = self._weighted("budgets")
        times = takewhile(lambda at_s: at_s < self.seconds, self._times())
        num = self.requests or (1000 if math.isinf(self.seconds) else None)

        def planned(at_s: float) -> PlannedRequest:
            block_ids, (input_len, output_len) = prefix(), (length() for length in lengths)
            return PlannedRequest(
                at_s,
                len(block_ids) * BLOCK_LEN + input_len,
                output_len,
                block_ids,
                user_id=users(),
                priority=read_priority(priorities() or NORMAL),
                slo_ttft_s=self.slo_ttft_s,
                model=models(),
                cost_budget=float(budget) if (budget := budgets()) else None,
            )

        return map(planned, islice(times, num))

    def _draw(self, purpose: str) -> Random:
        """A generator of its own for each purpose: one key does not change what others sample."""
        return Random(f"{self.seed}/{purpose}")

    def _times(self) -> Iterator[float]:
        draw, at_s = self._draw("arrivals"), 0.0
        peak = self.rate * (1 + self.amplitude)
        shape = 1 / self.cv**2
        for number in count():
            if self.arrivals == "constant":
                yield number / self.rate  # a sum of gaps would drift
            elif self.arrivals == "gamma":
                at_s += draw.gammavariate(shape, 1 / (self.rate * shape))
                yield at_s
            elif self.arrivals == "poisson":
                at_s += draw.expovariate(self.rate)
                yield at_s
            else:  # thinning: Lewis and Shedler, 1979
                at_s += draw.expovariate(peak)
                if draw.random() * peak < self._rate_at(at_s):
                    yield at_s

    def _rate_at(self, at_s: float) -> float:
        return self.rate * (1 + self.amplitude * math.sin(2 * math.pi * at_s / self.period_s))

    def _sampled(self, key: str) -> Callable[[], int]:
        sample = _sampler(key, getattr(self, key), self._draw(key))
        return lambda: max(1, round(sample()))

    def _weighted(self, key: str) -> Callable[[], str]:
        weights, draw = _weights(key, getattr(self, key)), self._draw(key)
        if not weights:
            return lambda: ""
        names, shares = tuple(weights), tuple(weights.values())
        return lambda: draw.choices(names, shares)[0]

    def _prefixes(self) -> Callable[[], tuple[int, ...]]:
        if not self.prefixes:
            return tuple
        draw, num = self._draw("prefixes"), self.prefix_len // BLOCK_LEN
        families = [tuple(range(k * num, (k + 1) * num)) for k in range(self.prefixes)]
        summed, total = [], 0.0
        for k in range(1, self.prefixes + 1):
            total += k**-self.zipf
            summed.append(total)
        return lambda: draw.choices(families, cum_weights=summed)[0]


def parse_synthetic(text: str) -> SyntheticWorkload:
    """The workload of a text form, with or without `synthetic:`. Raises TraceError, OSError."""
    kinds = {field.name: field.type for field in fields(SyntheticWorkload)}
    given: dict[str, Any] = {}
    for part in filter(None, text.removeprefix(PREFIX).split(",")):
        key, _, value = part.partition("=")
        if key not in kinds:
            close = nearest(key, list(kinds))
            hint = f"did you mean {close}?" if close else f"there are {', '.join(kinds)}"
            raise TraceError(f"no key {key!r}: {hint}", _FIX)
        if key in given:
            raise TraceError(f"{key} is given twice", "leave one out")
        given[key] = _value(key, value, kinds[key])
    workload = SyntheticWorkload(**given)
    _check(workload, given)
    return workload


def _value(key: str, text: str, kind: Any) -> Any:
    """A key's value. Raises TraceError for what is no number, and for a number out of range."""
    if kind is str:
        if not text:
            raise TraceError(f"{key} has no value", _FIX)
        return text
    try:
        number = int(text) if kind is int else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        wanted = "a whole number" if kind is int else "a number"
        raise TraceError(f"{key}={text}: no number", f"give {wanted}")
    if number <= 0 if key in _POSITIVE else number < 0 and key != "seed":
        raise TraceError(f"{key}={text}: too small", "give a number above 0")
    return number


def _check(workload: SyntheticWorkload, given: Mapping[str, Any]) -> None:
    """Raise TraceError for keys that contradict each other, and for wrong distributions."""
    if workload.arrivals not in ARRIVALS:
        raise TraceError(f"no arrivals {workload.arrivals!r}", f"there are {', '.join(ARRIVALS)}")
    for key, arrivals in _ONLY_FOR.items():
        if key in given and workload.arrivals != arrivals:
            raise TraceError(f"{key} is of {arrivals} arrivals", f"add arrivals={arrivals}")
    for key in _ONLY_WITH_PREFIXES:
        if key in given and not workload.prefixes:
            raise TraceError(f"{key} is of shared prefixes", "add prefixes=10")
    if workload.amplitude > 1:
        raise TraceError("an amplitude above 1 makes rates negative", "give 0 to 1")
    if not workload.prefix_len or workload.prefix_len % BLOCK_LEN:
        cause = f"prefix_len={workload.prefix_len} is no whole number of {BLOCK_LEN}-token blocks"
        raise TraceError(
            cause, f"give {max(1, round(workload.prefix_len / BLOCK_LEN)) * BLOCK_LEN}"
        )
    for key in ("input", "output"):
        _sampler(key, getattr(workload, key), Random(0))
    for key in ("users", "priorities", "models", "budgets"):
        names = _weights(key, getattr(workload, key))
        if key == "priorities":
            _check_priorities(names)
        elif key == "budgets":
            _check_budgets(names)


def _check_priorities(names: Mapping[str, float]) -> None:
    for name in names:
        try:
            read_priority(name)
        except ValueError as error:
            raise TraceError(f"priorities: {error}", _FIX) from None


def _check_budgets(names: Mapping[str, float]) -> None:
    for name in names:
        try:
            is_valid = 0 <= float(name) < math.inf
        except ValueError:
            is_valid = False
        if not is_valid:
            raise TraceError(
                f"budgets: {name!r} is no number of at least 0", "write budgets=1:9+5:1"
            )


def _weights(key: str, text: str) -> dict[str, float]:
    """Values with their weights, from `high:1+normal:9`; a missing weight is 1."""
    weights: dict[str, float] = {}
    for part in filter(None, text.split("+")):
        name, colon, weight = part.rpartition(":")
        try:
            weights[name if colon else part] = share = float(weight) if colon else 1.0
        except ValueError:
            share = 0.0
        if not 0 < share < math.inf:
            raise TraceError(f"{key}: {part!r} has no weight above 0", f"write {key}=a:1+b:9")
    return weights


_NUM_PARAMETERS = {"fixed": 1, "uniform": 2, "lognormal": 2, "exponential": 1}
_FORMS = "fixed:N, uniform:LOW:HIGH, lognormal:MEAN:SIGMA, exponential:MEAN, empirical:TRACE"


def _sampler(key: str, text: str, draw: Random) -> Callable[[], float]:
    """A function that samples lengths. `key` says which lengths of an empirical trace."""
    kind, _, rest = text.partition(":") if ":" in text else ("fixed", "", text)
    if kind == "empirical":
        lengths = [getattr(one, f"{key}_len") for one in read_trace(Path(rest))]
        return lambda: draw.choice(lengths)
    try:
        numbers = [float(part) for part in rest.split(":")]
    except ValueError:
        numbers = []
    is_valid = all(0 < number < math.inf for number in numbers)
    if len(numbers) != _NUM_PARAMETERS.get(kind) or not is_valid:
        raise TraceError(f"{key}={text} is no distribution of lengths", f"there are {_FORMS}")
    first, last = numbers[0], numbers[-1]
    if kind == "fixed":
        return lambda: first
    if kind == "uniform":
        if first > last:
            raise TraceError(f"{key}={text}: {first:g} is above {last:g}", "exchange them")
        return lambda: draw.randint(round(first), round(last))
    if kind == "lognormal":
        mu = math.log(first) - last**2 / 2  # the mean of the lengths is `first`
        return lambda: draw.lognormvariate(mu, last)
    return lambda: draw.expovariate(1 / first)
