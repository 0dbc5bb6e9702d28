"""sagellm in the smallest graph with an engine; the only driver that imports sagellm."""

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
# The least number of prompt tokens in a step while earlier sequences decode.
PREFILL_STEP = 256


class NotBuilt(RuntimeError):
    """This version has no option for a row."""


class Sagellm:
    """Streams requests of an open session in a trio thread."""

    _session: Session

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal(backend="trio"))

    def load(self, request: Load) -> None:
        graph = Graph("bench")
        graph.engine("g", model=request.path, **_options(request))
        recipe = graph >> ops.generate(engine="g")
        opening = self._portal.wrap_async_context_manager(recipe.open())
        self._session = self._stack.enter_context(opening)

    def run(self, request: Ask) -> list[list[float]]:
        return self._portal.call(self._run, request)

    async def _run(self, request: Ask) -> list[list[float]]:
        clock, spare = Clock(request), 0
        if request.together:
            spare = _spare(len(request.prompts), len(request.prompts[0]))
        sampling = Sampling(max_tokens=request.num_out + spare, ignore_eos=True)
        async with trio.open_nursery() as nursery:

            async def read(sequence: int) -> None:
                async with self._session.stream(
                    request.prompts[sequence], sampling=sampling
                ) as out:
                    async for event in out:
                        clock.note(sequence, len(event.token_ids))
                        if clock.is_late or _is_enough(request, clock):
                            nursery.cancel_scope.cancel()

            for sequence in range(len(request.prompts)):
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
    """The most tokens that the first sequence generates before the last one starts to decode."""
    return num_sequences * -(-prompt_len // PREFILL_STEP)


def _options(request: Load) -> dict[str, Any]:
    config = json.loads((Path(request.path) / "config.json").read_bytes())
    # One sequence of full length must fit. Blocks take memory only when they are written.
    spare = request.max_seqs * _spare(request.max_seqs, request.max_len)
    num_tokens = max(request.max_tokens + spare, config["max_position_embeddings"])
    options: dict[str, Any] = {
        "threads": request.threads,
        "num_blocks": -(-num_tokens // BLOCK) + request.max_seqs,
        "max_num_seqs": request.max_seqs,
        "prefix_caching": False,  # the other engines do not reuse prompts either
    }
    if request.row != "bf16":
        if "quantization" not in EngineOptions.__dataclass_fields__:
            raise NotBuilt("the engine has no option `quantization`")
        options["quantization"] = request.row
    return options


def _is_enough(request: Ask, clock: Clock) -> bool:
    return request.together and all(len(times) >= request.num_out for times in clock.times)


if __name__ == "__main__":
    serve(Sagellm())
