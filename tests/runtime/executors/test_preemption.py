"""How a host and the reader of an engine give preempted requests back."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from sagellm import Graph, Sampling, ops
from sagellm.runtime.core.events import Preempted
from sagellm.runtime.executors.engine_reader import EngineReader
from sagellm.runtime.messages import LeaseRef, Request, TokenEvent
from sagellm.runtime.operator import Signal
from sagellm.runtime.port import EngineEvent, EngineLoad, PrefillDone

KEY = ("r", 0)
LEASE = LeaseRef(engine="p", replica=0, lease_id=1, request_id="r", choice=0, epoch=0, num_tokens=4)


class Reading:
    """A reader whose engine gives one batch of events, and whose operator holds one request."""

    def __init__(self, *events: EngineEvent, preempted: bool = True) -> None:
        self.batch, self.handed_on, self.calls = events, list[EngineEvent](), list[Any]()
        self.preempted = {KEY} if preempted else set()
        engine = SimpleNamespace(
            events=lambda name: self.read(),
            cancel=lambda *fence: self.calls.append(fence),
            load=EngineLoad(),
        )
        plan = SimpleNamespace(subscribers=lambda *names: ())
        executor = SimpleNamespace(
            clock=lambda: 0.0, dispatch=self.calls.append, is_recorded=False,
            core=SimpleNamespace(plan=plan),
        )  # fmt: skip
        context: Any = SimpleNamespace(
            name="g", replica=0, executor=executor, engine=engine, preempted=self.preempted,
            meter=SimpleNamespace(process_s=0.0, num_errors=0),
            release=lambda key: self.calls.append(f"release {key}"),
        )  # fmt: skip
        service: Any = SimpleNamespace(on_events=self.on_events, recall=self.recall)
        trio.run(EngineReader(context, service).run)

    async def read(self) -> Any:
        yield self.batch

    async def on_events(self, context: Any, events: tuple[EngineEvent, ...]) -> None:
        self.handed_on += events

    def recall(self, context: Any, key: Any) -> Request:
        """The request, with the tokens that were handed on before."""
        mine = [one for one in self.handed_on if isinstance(one, TokenEvent) and one.key == KEY]
        number = sum(one.num_tokens for one in mine)
        return Request(request_id="r", emitted_token_ids=(7,) * number)

    @property
    def given_back(self) -> list[Request]:
        return [one.request for one in self.calls if isinstance(one, Preempted)]


def tokens(number: int, **fields: Any) -> TokenEvent:
    return TokenEvent(request_id="r", token_ids=(7,) * number, **fields)


def test_a_request_goes_back_after_the_tokens_of_its_last_step() -> None:
    end = tokens(2, position=1, finish_reason="cancelled")
    other = TokenEvent(request_id="other", token_ids=(9,))
    reading = Reading(tokens(1), other, end)
    (request,) = reading.given_back
    assert len(request.emitted_token_ids) == 3
    assert other in reading.handed_on
    assert all(one.finish_reason is None for one in reading.handed_on)
    assert reading.calls[0] == f"release {KEY}"


def test_a_prompt_that_was_done_before_the_cancel_frees_its_blocks() -> None:
    reading = Reading(PrefillDone(first=tokens(1), lease=LEASE))
    assert reading.calls[0] == ("r", 0, 0)
    assert reading.handed_on == []
    assert reading.given_back == [Request(request_id="r")]


@pytest.mark.parametrize("reason", ["stop", "length", "expired"])
def test_a_request_that_ended_by_itself_is_handed_on(reason: Any) -> None:
    end = tokens(1, finish_reason=reason)
    reading = Reading(end)
    assert reading.handed_on == [end]
    assert reading.given_back == []


def test_the_end_of_a_cancelled_request_is_handed_on() -> None:
    end = tokens(0, finish_reason="cancelled")
    reading = Reading(end, preempted=False)
    assert reading.handed_on == [end]
    assert reading.given_back == []


async def test_a_choice_that_is_cancelled_while_it_is_preempted_ends(autojump_clock: Any) -> None:
    graph = Graph("g").engine("g", model="null", device="null", decode_step_s=0.1)
    preempts = {"critical": "low"}
    graph = graph >> ops.policy_sort(preempts=preempts) >> ops.generate(engine="g")
    async with graph.open() as session:
        (host,) = session.executor._hosts.values()
        async with trio.open_nursery() as nursery:
            sampling = Sampling(max_tokens=50, ignore_eos=True)
            answers: list[Any] = []

            async def ask() -> None:
                stream = session.stream([1] * 8, sampling=sampling, request_id="r")
                answers.extend([event async for event in stream])

            nursery.start_soon(ask)
            await trio.sleep(1)
            host.signal(Signal("cancel", *KEY), preempted=(KEY,))
            session.executor.signal(Signal("cancel", *KEY))
        assert answers[-1].finish_reason == "cancelled"
        assert not session.executor.core.preemption.num_preempted
