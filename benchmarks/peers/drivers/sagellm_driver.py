"""sagellm, through the smallest graph that has an engine; the only driver that imports it."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio
from anyio.from_thread import start_blocking_portal
from wire import Ask, Clock, Load, serve

from sagellm import Graph, Sampling, ops
from sagellm.runtime.engine.options import EngineOptions
from sagellm.session import Session

BLOCK = 16
# A step computes at least so many tokens of a prompt, while the sequences before go on decoding.
PREFILL_STEP = 256


class NotBuilt(RuntimeError):
    """A row that this version has no option for."""


class Sagellm:
    """Streams of an open session, in a trio thread."""

    _session: Session

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal(backend="trio"))

    def load(self, asked: Load) -> None:
        graph = Graph("bench")
        graph.engine("g", model=asked.path, **_options(asked))
        recipe = graph >> ops.generate(engine="g")
        opening = self._portal.wrap_async_context_manager(recipe.open())
        self._session = self._stack.enter_context(opening)

    def run(self, asked: Ask) -> list[list[float]]:
        return self._portal.call(self._run, asked)

    async def _run(self, asked: Ask) -> list[list[float]]:
        clock, spare = Clock(asked), 0
        if asked.together:
            spare = _spare(len(asked.prompts), len(asked.prompts[0]))
        sampling = Sampling(max_tokens=asked.num_out + spare, ignore_eos=True)
        async with trio.open_nursery() as nursery:

            async def read(sequence: int) -> None:
                async with self._session.stream(asked.prompts[sequence], sampling=sampling) as out:
                    async for event in out:
                        clock.note(sequence, len(event.token_ids))
                        if clock.is_late or _is_enough(asked, clock):
                            nursery.cancel_scope.cancel()

            for sequence in range(len(asked.prompts)):
                nursery.start_soon(read, sequence)
        return clock.times

    def score(self, prompt: list[int]) -> list[float]:
        return self._portal.call(self._score, prompt)

    async def _score(self, prompt: list[int]) -> list[float]:
        sampling = Sampling(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        found: list[float] = []
        async with self._session.stream(prompt, sampling=sampling) as out:
            async for event in out:
                found += [scored.logprob for scored in event.prompt_logprobs]
        return found


def _spare(num_sequences: int, prompt_len: int) -> int:
    """How many tokens the first sequence draws, at most, until the last one has begun."""
    return num_sequences * -(-prompt_len // PREFILL_STEP)


def _options(asked: Load) -> dict[str, Any]:
    config = json.loads((Path(asked.path) / "config.json").read_bytes())
    # One sequence of full length must fit; blocks take memory only once they are written.
    spare = asked.max_seqs * _spare(asked.max_seqs, asked.max_len)
    num_tokens = max(asked.max_tokens + spare, config["max_position_embeddings"])
    options: dict[str, Any] = {
        "threads": asked.threads,
        "num_blocks": -(-num_tokens // BLOCK) + asked.max_seqs,
        "max_num_seqs": asked.max_seqs,
        "prefix_caching": False,  # the other engines find no prompt of theirs again
    }
    if asked.row != "bf16":
        if "quantization" not in EngineOptions.__dataclass_fields__:
            raise NotBuilt("the engine has no option `quantization`")
        options["quantization"] = asked.row
    return options


def _is_enough(asked: Ask, clock: Clock) -> bool:
    return asked.together and all(len(times) >= asked.num_out for times in clock.times)


if __name__ == "__main__":
    serve(Sagellm())
