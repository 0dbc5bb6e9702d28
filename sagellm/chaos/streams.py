"""The streams that a scenario asks of a graph, and what comes of them."""

import random
from dataclasses import dataclass, field

import trio

from sagellm.chaos.scenario import Load
from sagellm.runtime.messages import Sampling
from sagellm.session import Session

_IDS = range(20, 120)  # token ids that every model has


@dataclass
class Outcome:
    """What came of the streams of one run."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (load, number)
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def fewest(self) -> int:
        """Tokens that every stream that still runs has had."""
        running = [len(found) for key, found in self.tokens.items() if key not in self.reasons]
        return min(running, default=0)


def begin_streams(
    session: Session, outcome: Outcome, number: int, load: Load, nursery: trio.Nursery
) -> None:
    """All streams of a load; `number` tells loads of one scenario apart."""
    for stream in range(load.streams):
        nursery.start_soon(_stream, session, outcome, (number, stream), load)


async def _stream(session: Session, outcome: Outcome, key: tuple[int, int], load: Load) -> None:
    draw = random.Random(f"{load.seed} {key}")
    prompt = draw.choices(_IDS, k=load.prompt_tokens)
    sampling = Sampling(
        max_tokens=load.max_tokens,
        temperature=load.temperature,
        seed=draw.getrandbits(32),
        ignore_eos=True,
    )
    outcome.tokens[key] = []
    heard_s: float | None = None
    async with session.stream(prompt, sampling=sampling) as stream:
        while outputs := await stream.take():
            now = trio.current_time()
            if heard_s is not None:
                outcome.gaps_s.append(now - heard_s)
            heard_s = now
            for event in outputs:
                outcome.tokens[key] += event.token_ids
                if event.finish_reason is not None:
                    outcome.reasons[key] = event.finish_reason
