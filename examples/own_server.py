"""Own code, served over HTTP: a function, an operator, a service operator and a strategy.

`python own_server.py --once` asks one question and ends; without it the server stays.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2
import trio

import sagellm
from sagellm import Graph, Request, ops
from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.routing import Candidates
from sagellm.runtime.messages import refusal
from sagellm.runtime.operator import (
    Arrival,
    Context,
    Credit,
    Draw,
    Emit,
    Input,
    Setup,
    Signal,
    Step,
    Terminate,
)


# A function: what `map` calls.
@sagellm.function
def tidy(request: Request) -> str:
    return request.prompt.replace("\t", "    ")


# A logic operator: pure, from a state and an input to the next state and what to send.
@dataclass(frozen=True, slots=True)
class LimitOptions:
    longest: int = 1000  # characters


@dataclass(frozen=True, slots=True)
class Limit:
    longest: int
    initial: None = None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=Request() as request) if len(request.prompt) > self.longest:
                error = f"the prompt is longer than {self.longest} characters"
                end = refusal(request, "refused", now=now, error=error, code="bad_request")
                return Step(None, (Terminate(end),))
            case Arrival(item):
                return Step(None, (Emit(item),))
        return Step(None)


def build_limit(options: LimitOptions, setup: Setup) -> Limit:
    return Limit(options.longest)


REQUESTS = ((Port("in", REQUEST),), (Port("out", REQUEST),))
sagellm.register_operator(OpSpec("limit", *REQUESTS, LimitOptions), build_limit)


# A service operator: it may wait, here for something that could be a database.
class LookUp:
    concurrency = 8  # items at a time
    holds = False  # it lets go of an item once `on_item` has returned

    def capacity(self, facts: Any) -> Credit:
        return Credit(requests=self.concurrency)

    async def on_item(self, ctx: Context, item: Any) -> None:
        await trio.lowlevel.checkpoint()
        print(f"{ctx.name}: looked up a prompt of {len(item.prompt)} characters")
        await ctx.emit(item)

    async def on_events(self, ctx: Context, events: Any) -> None:
        """None come: it has no engine."""

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        """A cancel: the executor cancels `on_item` itself."""

    def recall(self, ctx: Context, key: tuple[str, int]) -> None:
        """It has no engine that could lose a request."""

    def discard(self, ctx: Context, item: Any) -> None:
        """An item holds nothing here."""


def build_look_up(options: Any, setup: Setup) -> LookUp:
    return LookUp()


sagellm.register_operator(OpSpec("look_up", *REQUESTS, role="service"), build_look_up)


# A strategy: which replica of the candidates a request goes to.
def by_length(candidates: Candidates, now: float, draw: Draw) -> int:
    numbers = candidates.numbers
    return numbers[len(candidates.request.prompt) % len(numbers)]


sagellm.register_strategy("by_length", by_length)


def build() -> Graph:
    graph = Graph("own").engine("g", model="sage-tiny", replicas=2)
    graph >> ops.map(tidy) >> ops.limit(longest=200) >> ops.look_up() >> ops.policy_sort()
    tail = graph >> ops.route("by_length") >> ops.generate(engine="g") >> ops.metrics_sink()
    return tail


async def ask_once() -> None:
    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(build().serve_async, port=0))
        question = {"role": "user", "content": "What is 20 + 31?"}
        for content in (question["content"], "What? " * 50):
            body = {"model": "sage-tiny", "messages": [{**question, "content": content}]}
            async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
                reply = await client.post(f"{url}/v1/chat/completions", json=body)
            print(reply.status_code, reply.text[:300])
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    if "--once" in sys.argv:
        trio.run(ask_once)
    else:
        build().serve(port=8000)
