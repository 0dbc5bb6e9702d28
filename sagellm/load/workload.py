"""What is sent when: requests with lengths, and with arrival times where the loop is open."""

from collections.abc import Iterable, Iterator
from itertools import count, takewhile
from random import Random

from sagellm.load.trace import Arrival


def closed(input_len: int, output_len: int, spread: float, seed: int) -> Iterator[Arrival]:
    """Requests without end; when each is sent, the answers before it decide."""
    draw = Random(f"{seed}/lengths")
    for _ in count():
        yield Arrival(0.0, _near(draw, input_len, spread), _near(draw, output_len, spread))


def poisson(arrivals: Iterable[Arrival], rate: float, seed: int) -> Iterator[Arrival]:
    """The same requests at the times of a Poisson process of `rate` requests a second.

    The first comes after a gap like any other, so that the times are those of the process.
    """
    draw, at_s = Random(f"{seed}/arrivals"), 0.0
    for arrival in arrivals:
        at_s += draw.expovariate(rate)
        yield Arrival(at_s, arrival.input_len, arrival.output_len)


def replay(
    arrivals: Iterable[Arrival],
    *,
    speedup: float = 1.0,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
) -> Iterator[Arrival]:
    """A trace, faster or slower than it was, and with lengths clipped."""
    for arrival in arrivals:
        yield Arrival(
            arrival.at_s / speedup,
            _clip(arrival.input_len, max_input_len),
            _clip(arrival.output_len, max_output_len),
            arrival.block_ids,
        )


def within(arrivals: Iterable[Arrival], duration_s: float) -> Iterator[Arrival]:
    """Those that come before the time is over."""
    return takewhile(lambda arrival: arrival.at_s < duration_s, arrivals)


def _near(draw: Random, length: int, spread: float) -> int:
    """Uniform in length * (1 +- spread), one at least."""
    low, high = round(length * (1 - spread)), round(length * (1 + spread))
    return max(1, draw.randint(low, high))


def _clip(length: int, longest: int | None) -> int:
    return length if longest is None else min(length, longest)
