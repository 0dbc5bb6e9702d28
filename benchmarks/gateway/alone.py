"""The graph without a gateway: tasks of its own process send the same requests.

    python -m benchmarks.gateway.alone CONNECTIONS SECONDS MAX_TOKENS

Prints one JSON line: requests, events, microseconds of CPU.
"""

import json
import sys
import time
from pathlib import Path

import trio

from sagellm import Graph, Sampling
from sagellm.session import Session

GRAPH = Path(__file__).parent / "null.yaml"


async def ask(session: Session, sampling: Sampling, until: float, seen: list[int]) -> None:
    """One client. Appends the number of batches of each of its requests to `seen`."""
    while time.perf_counter() < until:
        num_batches = 0
        async with session.stream([1, 2, 3], sampling=sampling) as stream:
            while await stream.take():
                num_batches += 1
        seen.append(num_batches)


async def main() -> None:
    connections, seconds, max_tokens = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
    async with Graph.load(GRAPH).open() as session:
        seen: list[int] = []
        before, until = time.process_time(), time.perf_counter() + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(connections):
                nursery.start_soon(ask, session, sampling, until, seen)
        cpu_us = 1e6 * (time.process_time() - before)
    print(json.dumps({"requests": len(seen), "events": sum(seen), "cpu_us": cpu_us}))


if __name__ == "__main__":
    trio.run(main)
