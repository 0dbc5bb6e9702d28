"""Cases of teams of threads: helpers that fell asleep; systems without memory or threads."""

from collections.abc import Iterator

import numpy as np
from native_kernels.attention import DECODE, Shape, attention
from native_kernels.calls import Calls, Results
from native_kernels.cases import Case, close, packed_linear, random

GRANTS = range(8)  # a team of three takes seven: the team, and for each helper memory and a thread


def cases() -> Iterator[Case]:
    for allowed in GRANTS:
        yield product(allowed, sleep_us=0)
    yield product(-1, sleep_us=2000)
    yield attention_without_memory()


def product(allowed: int, sleep_us: int) -> Case:
    """Products on three threads where the system grants only some requests: never another bit."""
    calls, x, weight = Calls(f"a team with {allowed} grants"), random(5, 70), random(130, 70)
    linear = packed_linear(calls, weight, None, "float", threads=1)
    alone, *others = (calls.array(np.zeros((5, 130), np.float32), is_kept=True) for _ in range(5))
    rows = calls.array(x)
    calls.call("sage_linear", linear, rows, 70, alone, 130, 5, 1)
    calls.call("allow", allowed)
    for out in others:
        calls.call("sage_linear", linear, rows, 70, out, 130, 5, 3)
        calls.call("sleep_us", sleep_us)

    def check(results: Results) -> None:
        close(results[alone], x.astype(np.float64) @ weight.T, atol=2e-4)
        assert all((results[out] == results[alone]).all() for out in others)

    return Case(calls, check)


def attention_without_memory() -> Case:
    """Attention says that it has no memory."""
    whole = attention(Shape(), DECODE)
    calls = whole.calls
    calls.name = "attention without memory"
    calls.calls.insert(0, ("allow", (0,)))

    def check(results: Results) -> None:
        assert results.returned[1:4] == [1, 1, 1]

    return Case(calls, check)
