"""Time to the first token after a shared prompt, with prefix reuse and without, in turns.

`python -m benchmarks.prefix [--model FOLDER]` prints the medians and their ratio.
"""

import random
import statistics
import time
from pathlib import Path

from cyclopts import App

from benchmarks.ours import NUM_BLOCKS
from benchmarks.weights import model_folder
from sagellm import Graph, Sampling, ops
from sagellm.opening.bridge import BlockingSession

APP = App(name="python -m benchmarks.prefix", help=__doc__)
_ONE = Sampling(max_tokens=1, ignore_eos=True)


@APP.default
def prefix(
    *,
    model: str = "",
    prompt_len: int = 1024,
    end_len: int = 16,
    rounds: int = 5,
    threads: int = 2,
    dtype: str | None = None,
    vocab_size: int = 256,
) -> None:
    """Measure the second request of a shared prompt, and print.

    Parameters
    ----------
    model
        A built-in name, a folder or a Hub id; unless given, the shape of Qwen2.5-0.5B.
    prompt_len
        Tokens that both requests begin with.
    end_len
        Tokens behind them that differ.
    rounds
        Pairs of requests, each with a prompt of its own.
    threads
        Threads of the engine.
    dtype
        Of weights and blocks; the model's own unless given.
    vocab_size
        Tokens are drawn below it.
    """
    folder = model or str(model_folder())
    draw = random.Random(0)
    kept, unkept = (_graph(folder, threads, dtype, is_on=is_on) for is_on in (True, False))
    with kept.open() as on, unkept.open() as off:
        times: dict[BlockingSession, list[float]] = {on: [], off: []}
        for number in range(rounds + 1):
            shared = [draw.randrange(1, vocab_size) for _ in range(prompt_len)]
            first, second = (
                shared + [draw.randrange(1, vocab_size) for _ in range(end_len)] for _ in range(2)
            )
            for session, taken in times.items():
                _first_token_s(session, first)
                seconds = _first_token_s(session, second)
                taken += [seconds] if number else []  # the first round warms up
        with_s, without_s = (statistics.median(taken) for taken in times.values())
    print(
        f"{Path(folder).name}, {prompt_len} + {end_len} tokens: with {with_s * 1e3:.1f} ms, "
        f"without {without_s * 1e3:.1f} ms, {without_s / with_s:.1f} times"
    )


def _graph(model: str, threads: int, dtype: str | None, *, is_on: bool) -> Graph:
    graph = Graph("prefix")
    graph.engine(
        "g", model=model, threads=threads, dtype=dtype, num_blocks=NUM_BLOCKS, prefix_caching=is_on
    )
    return graph >> ops.generate(engine="g")


def _first_token_s(session: BlockingSession, prompt: list[int]) -> float:
    started = time.perf_counter()
    session.generate(prompt, sampling=_ONE)
    return time.perf_counter() - started


if __name__ == "__main__":
    APP()
