"""Preempted answers have the tokens and the text that they have without, in every executor."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from endings import outputs
from process_streams import NUM_TOKENS, PROMPTS, opened

from sagellm import Sampling
from sagellm.session import Session

PREEMPTS = {"sort.preempts": {"critical": "low"}, "sort.policy": "priority"}
# Two answers at a time, so that the others wait.
FEW = {
    "joint": {"g.max_num_seqs": 2},
    "pd": {"d.max_num_seqs": 2, "decode.max_inflight": 2, "prefill.max_inflight": 2},
}
GREEDY = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=5)
SHORT = Sampling(max_tokens=3, ignore_eos=True)
BACKGROUND = dict(enumerate(PROMPTS[:4]))
URGENT = {number: PROMPTS[number] for number in range(10, 14)}
KNOWN: dict[tuple[str, float], dict[int, tuple[list[int], str]]] = {}


@dataclass
class Answers:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)

    async def ask(self, session: Session, number: int, sampling: Sampling, **fields: Any) -> None:
        self.tokens[number], self.texts[number] = [], ""
        prompt = {**BACKGROUND, **URGENT}[number]
        async with session.stream(prompt, sampling=sampling, **fields) as stream:
            async for event in outputs(stream):
                self.tokens[number] += event.token_ids
                self.texts[number] += event.text
        self.ended.append(number)

    @property
    def outcome(self) -> dict[int, tuple[list[int], str]]:
        return {number: (self.tokens[number], self.texts[number]) for number in self.tokens}


async def played(session: Session, sampling: Sampling, *, victims: str = "background") -> Answers:
    """Background answers, and an urgent one each time that any has some more tokens."""
    answers = Answers()

    async def urge() -> None:
        for place, number in enumerate(URGENT, start=1):
            longest = 20 * place
            while max(map(len, answers.tokens.values()), default=0) < longest:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await answers.ask(session, number, SHORT, priority="critical")

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in BACKGROUND:
                nursery.start_soon(
                    lambda n=number: answers.ask(session, n, sampling, priority=victims)
                )
            nursery.start_soon(urge)
    return answers


async def right(graph: str, sampling: Sampling) -> dict[int, tuple[list[int], str]]:
    """The answers where all find a place."""
    key = graph, sampling.temperature
    if key not in KNOWN:
        async with opened(graph, "tasks") as session:
            KNOWN[key] = (await played(session, sampling)).outcome
    return KNOWN[key]


@pytest.mark.parametrize("executor", ["tasks", "processes"])
@pytest.mark.parametrize(
    ("graph", "sampling"), [("joint", GREEDY), ("joint", SEEDED), ("pd", GREEDY), ("pd", SEEDED)]
)
async def test_a_victim_has_the_same_tokens(graph: str, sampling: Sampling, executor: str) -> None:
    async with opened(graph, executor, **PREEMPTS, **FEW[graph]) as session:
        found = await played(session, sampling)
        preempted = session.executor.core.preemption.num_preempted
        assert preempted[4] >= 2
    assert found.outcome == await right(graph, sampling)


@pytest.mark.parametrize("fields", [{"priority": "normal"}, {"can_be_preempted": False}])
async def test_other_answers_keep_their_places(fields: dict[str, Any]) -> None:
    answers = Answers()
    async with opened("joint", "tasks", **PREEMPTS, **{"g.max_num_seqs": 1}) as session:
        async with trio.open_nursery() as nursery:
            fields = {"priority": "background", **fields}
            nursery.start_soon(lambda: answers.ask(session, 0, GREEDY, **fields))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(lambda: answers.ask(session, 10, SHORT, priority="critical"))
        assert not session.executor.core.preemption.num_preempted
    assert answers.ended == [0, 10]


async def test_both_choices_of_a_victim_go_on() -> None:
    two = Sampling(max_tokens=60, ignore_eos=True, temperature=1.0, seed=3, n=2)

    async def choices(session: Session) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {0: [], 1: []}
        stream = session.stream(PROMPTS[0], sampling=two, priority="background")
        async for event in outputs(stream):
            found[event.choice] += event.token_ids
            if len(found[0]) == 20:
                nursery.start_soon(
                    lambda: session.generate(PROMPTS[10], sampling=SHORT, priority="critical")
                )
        return found

    outcomes = []
    for options in ({}, {**PREEMPTS, "g.max_num_seqs": 2}):
        async with opened("joint", "tasks", **options) as session:
            async with trio.open_nursery() as nursery:
                outcomes.append(await choices(session))
            num_preempted = session.executor.core.preemption.num_preempted.total()
            assert (num_preempted > 0) == bool(options)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_victims_that_are_cancelled_at_random_leave_nothing(graph: str) -> None:
    """`opened` checks the ledger and the leases."""
    draw = random.Random(graph)
    scopes: dict[int, trio.CancelScope] = {}
    num_tokens = 0
    async with opened(graph, "tasks", **PREEMPTS, **FEW[graph]) as session:

        async def work(number: int) -> None:
            nonlocal num_tokens
            prompt = [number, *[1] * draw.randint(20, 99)]
            stream = session.stream(prompt, sampling=GREEDY, priority="background")
            with trio.CancelScope() as scopes[number]:
                async with stream:
                    async for event in outputs(stream):
                        num_tokens += len(event.token_ids)
            del scopes[number]

        async def urge() -> None:
            """An urgent request after each ten tokens; background requests are cancelled as it
            preempts one of them.
            """
            for number in range(20):
                before = num_tokens
                while num_tokens < before + 10 and scopes:
                    await trio.lowlevel.checkpoint()
                urgent = session.stream(PROMPTS[number], sampling=SHORT, priority="critical")
                async with urgent:
                    await trio.lowlevel.checkpoint()
                    for one in draw.sample(sorted(scopes), min(2, len(scopes))):
                        scopes[one].cancel()
                    if number % 3:
                        await anext(aiter(urgent))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(work, number)
                nursery.start_soon(urge)
        assert session.executor.core.preemption.num_preempted.total() > 3
        assert session.executor.core.ledger.ended["cancelled"] > 20
