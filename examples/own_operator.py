"""An operator of your own: a guard that refuses prompts with a forbidden word."""

from dataclasses import dataclass

import trio

from sagellm import Graph, RequestRefused, Sampling, ops, register_operator
from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.messages import Request, refusal
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Step, Terminate


@dataclass(frozen=True, slots=True)
class Options:
    """`word`: what no prompt may hold."""

    word: str


SPEC = OpSpec("guard", (Port("in", REQUEST),), (Port("out", REQUEST),), options=Options)


@dataclass(frozen=True, slots=True)
class Guard:
    """Pure: its state is the number of requests that it refused."""

    word: str
    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        match happened:
            case Arrival(item=Request() as request) if self.word in request.prompt:
                error = f"the prompt holds {self.word!r}"
                return Step(
                    state + 1, (Terminate(refusal(request, "refused", now=now, error=error)),)
                )
            case Arrival(item):
                return Step(state, (Emit(item),))
        return Step(state)


def build(options: Options, setup: Setup) -> Guard:
    return Guard(options.word)


register_operator(SPEC, build)


async def main() -> None:
    graph = Graph("guarded").engine("g", model="sage-tiny")
    graph >> ops.guard("rm -rf") >> ops.generate(engine="g") >> ops.metrics_sink()
    async with graph.open() as guarded:
        for prompt in ("import os", "rm -rf /"):
            try:
                answer = await guarded.generate(prompt, sampling=Sampling(max_tokens=8))
                print(f"{prompt!r}: {answer.finish_reason}: {answer.text!r}")
            except RequestRefused as error:
                print(f"{prompt!r}: refused: {error}")


if __name__ == "__main__":
    trio.run(main)
