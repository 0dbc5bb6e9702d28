"""Preemption in the core: who is recalled, when, and how often."""

from typing import Any

import pytest
from msgspec.structs import replace

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Deliver, Effect, Preempt, Send, WakeAt
from sagellm.runtime.core.events import (
    Arrived,
    Emitted,
    Opened,
    Preempted,
    Released,
    ReplicaMarked,
    Signalled,
    TimeCame,
)
from sagellm.runtime.core.preemption import MAX_PREEMPTIONS
from sagellm.runtime.messages import PRIORITIES, Request, TokenEvent
from sagellm.runtime.operator import Credit, Signal
from sagellm.runtime.plan import plan

CLASSES = {"critical": "low"}


def ask(name: str, priority: str = "background", **fields: Any) -> Request:
    fields = {"prompt_token_ids": (1, 2), **fields}
    return Request(request_id=name, priority=PRIORITIES[priority], **fields)


class Played:
    """A core of one engine. `running` holds the latest form of each request in the engine."""

    def __init__(
        self, *, places: int = 2, replicas: int = 1, can_resume: bool = True, **options: Any
    ) -> None:
        options = {"preempts": CLASSES, **options}
        graph = Graph("g").engine("g", replicas=replicas)
        shaped = (graph >> ops.policy_sort(**options) >> ops.route() >> ops.generate(engine="g")).ir
        self.core = Core(plan(shaped, RESOLVER, {"g": replicas}))
        self.now, self.wake_s = 0.0, float("inf")
        self.running: dict[str, tuple[int, Request]] = {}
        self.ended: dict[str, str] = {}
        credit = Credit(places, blocks=1e9)
        for number in range(replicas):
            self.on(Opened("generate", number, credit, 16, can_resume))

    def on(self, event: Any) -> list[str]:
        """Give an event to the core. Returns the requests that it recalls."""
        return self._apply(self.core.on(event, self.now))

    def _apply(self, effects: list[Effect]) -> list[str]:
        recalled = []
        for effect in effects:
            if isinstance(effect, Send):
                assert isinstance(effect.item, Request)
                self.running[effect.item.request_id] = effect.replica, effect.item
            elif isinstance(effect, Preempt):
                assert self.running[effect.request_id][0] == effect.replica
                recalled.append(effect.request_id)
            elif isinstance(effect, WakeAt):
                self.wake_s = effect.at_s
            elif isinstance(effect, Deliver) and isinstance(effect.item, TokenEvent):
                self.ended[effect.item.request_id] = effect.item.finish_reason or ""
        return recalled

    def arrive(self, *requests: Request) -> list[str]:
        return self.on(Arrived(1, requests))

    def emit(self, name: str, number: int) -> None:
        """Let the engine emit tokens of a request."""
        replica, request = self.running[name]
        position = request.num_emitted
        event = TokenEvent(request_id=name, position=position, token_ids=(7,) * number)
        self.on(Emitted(1, "generate", replica, (event,)))
        emitted = (*request.emitted_token_ids, *event.token_ids)
        self.running[name] = replica, replace(request, emitted_token_ids=emitted)

    def give_back(self, name: str) -> list[str]:
        """Let the engine stop a request. Returns the requests that are recalled therefore."""
        replica, request = self.running.pop(name)
        recalled = self.on(Released("generate", replica, name, 0))
        return recalled + self.on(Preempted("generate", request))

    def finish(self, name: str) -> list[str]:
        replica, request = self.running.pop(name)
        last = TokenEvent(
            request_id=name, position=request.num_emitted, token_ids=(7,), finish_reason="length"
        )
        self.on(Emitted(1, "generate", replica, (last,)))
        return self.on(Released("generate", replica, name, 0))


def test_a_waiting_critical_request_takes_the_place_of_background_work() -> None:
    played = Played()
    assert played.arrive(ask("a")) == played.arrive(ask("b", "low")) == []
    assert played.arrive(ask("urgent", "critical")) == ["a"]
    played.emit("a", 3)
    assert played.give_back("a") == []
    assert set(played.running) == {"b", "urgent"}
    played.finish("urgent")
    assert played.running["a"][1].emitted_token_ids == (7, 7, 7)
    assert played.running["a"][1].epoch == 1
    for name in "ab":
        played.finish(name)
    played.core.ledger.check()
    assert played.core.is_at_rest
    assert played.core.preemption.num_preempted == {PRIORITIES["background"]: 1}


def test_nothing_is_preempted_without_the_option() -> None:
    played = Played(places=1, preempts={})
    played.arrive(ask("a"))
    assert played.arrive(ask("urgent", "critical")) == []
    assert not played.core.preemption.is_enabled


def test_a_queue_with_a_shadow_preempts_as_it_does_without() -> None:
    played = Played(places=1, shadow={"policy": "priority"})
    played.arrive(ask("a"))
    assert played.arrive(ask("urgent", "critical")) == ["a"]


def test_nothing_is_preempted_while_there_is_room() -> None:
    played = Played(places=2)
    played.arrive(ask("a"))
    assert played.arrive(ask("urgent", "critical")) == []
    assert "urgent" in played.running


@pytest.mark.parametrize("asking", ["high", "normal", "low", "background"])
def test_classes_without_an_entry_preempt_nothing(asking: str) -> None:
    played = Played(places=1)
    played.arrive(ask("a"))
    assert played.arrive(ask("other", asking)) == []


@pytest.mark.parametrize("running", ["critical", "high", "normal"])
def test_classes_above_the_entry_keep_their_places(running: str) -> None:
    played = Played(places=1)
    played.arrive(ask("a", running))
    assert played.arrive(ask("urgent", "critical")) == []


def test_a_class_preempts_what_a_less_urgent_class_may_preempt() -> None:
    played = Played(places=1, preempts={"critical": "background", "normal": "low"})
    played.arrive(ask("a", "low"))
    assert played.arrive(ask("urgent", "high")) == ["a"]


def test_a_request_that_must_not_be_preempted_keeps_its_place() -> None:
    played = Played(places=1)
    played.arrive(ask("a", can_be_preempted=False))
    assert played.arrive(ask("urgent", "critical")) == []


def test_an_engine_that_cannot_resume_keeps_its_requests() -> None:
    played = Played(places=1, can_resume=False)
    played.arrive(ask("a"))
    assert played.arrive(ask("urgent", "critical")) == []


def test_the_victim_is_of_the_lowest_class_and_has_the_least_to_compute_again() -> None:
    played = Played(places=4)
    played.arrive(ask("low", "low"))
    played.arrive(ask("short", prompt_token_ids=(1,) * 20))
    played.arrive(ask("long", prompt_token_ids=(1,) * 30))
    played.arrive(ask("medium", prompt_token_ids=(1,) * 25))
    played.emit("short", 9)
    names = [played.arrive(ask(f"urgent{n}", "critical")) for n in range(4)]
    assert names == [["medium"], ["short"], ["long"], ["low"]]


def test_each_waiting_request_recalls_one() -> None:
    played = Played(places=2)
    played.arrive(ask("a"))
    played.arrive(ask("b"))
    assert played.arrive(ask("one", "critical")) == ["b"]
    assert played.arrive(ask("two", "critical")) == ["a"]
    assert played.arrive(ask("three", "critical")) == []
    played.give_back("a")
    played.give_back("b")
    assert set(played.running) == {"one", "two"}


def test_the_place_goes_to_the_claimant_whatever_waits_before_it() -> None:
    played = Played(places=1, policy="fifo")
    for name in "abc":
        played.arrive(ask(name, "normal" if name == "b" else "background"))
    assert played.arrive(ask("urgent", "critical")) == ["a"]
    played.give_back("a")
    assert set(played.running) == {"urgent"}


def test_the_victim_goes_before_later_requests_of_its_class() -> None:
    played = Played(places=1, policy="fifo")
    for number, name in enumerate("abc"):
        played.now = float(number)
        arrived = replace(ask(name).stamps, arrived_s=played.now)
        played.arrive(ask(name, stamps=arrived))
    played.arrive(ask("urgent", "critical"))
    played.give_back("a")
    played.finish("urgent")
    assert set(played.running) == {"a"}


def test_a_place_that_becomes_free_by_itself_is_used() -> None:
    played = Played(places=2)
    played.arrive(ask("a"))
    played.arrive(ask("b"))
    assert played.arrive(ask("urgent", "critical")) == ["b"]
    played.finish("a")
    assert "urgent" in played.running
    played.give_back("b")
    assert "b" in played.running


def test_a_victim_that_ends_before_its_engine_stops_is_not_counted() -> None:
    played = Played(places=1)
    played.arrive(ask("a"))
    assert played.arrive(ask("urgent", "critical")) == ["a"]
    played.finish("a")
    assert set(played.running) == {"urgent"}
    assert not played.core.preemption.num_preempted


def test_a_victim_that_was_cancelled_meanwhile_ends() -> None:
    played = Played(places=1)
    played.arrive(ask("a"))
    played.arrive(ask("urgent", "critical"))
    played.on(Signalled(Signal("cancel", "a")))
    played.give_back("a")
    assert played.ended["a"] == "cancelled"
    assert set(played.running) == {"urgent"}


def test_a_request_is_preempted_a_few_times_only() -> None:
    assert MAX_PREEMPTIONS == 5
    played = Played(places=1)
    played.arrive(ask("a"))
    for number in range(MAX_PREEMPTIONS):
        assert played.arrive(ask(f"urgent{number}", "critical")) == ["a"]
        played.give_back("a")
        played.finish(f"urgent{number}")
        assert "a" in played.running
    assert played.arrive(ask("urgent", "critical")) == []
    played.finish("a")
    assert "urgent" in played.running
    played.arrive(ask("b"))
    played.finish("urgent")
    assert played.arrive(ask("more", "critical")) == ["b"]  # the count belongs to a request


def test_a_lost_replica_gives_no_victims() -> None:
    played = Played(places=1, replicas=2)
    played.arrive(ask("a"))
    played.arrive(ask("b"))
    lost, _ = played.running["b"]  # the latest, and so the first choice
    played.on(ReplicaMarked("g", lost, False))
    assert played.arrive(ask("urgent", "critical")) == ["a"]


def test_a_long_prompt_recalls_as_many_of_one_replica_as_it_needs() -> None:
    played = Played(places=8, replicas=2)
    for number in range(2):
        played.on(Opened("generate", number, Credit(8, blocks=16), 16, True))
    for name in "abcdefgh":  # 4 blocks each
        played.arrive(ask(name, prompt_token_ids=(1,) * 60))
    recalled = played.arrive(ask("urgent", "critical", prompt_token_ids=(1,) * 120))  # 8 blocks
    assert len(recalled) == 2
    assert len({played.running[name][0] for name in recalled}) == 1


def served(played: Played, number: int, each_s: float) -> None:
    """Serve requests that waited, each for `each_s` seconds, so that the pace is known."""
    for name in range(number):
        played.arrive(ask(f"earlier{name}", "normal"))
    for name in range(number):
        played.now += each_s
        played.finish(f"earlier{name}")


def test_a_claim_waits_for_a_place_that_is_free_sooner_than_a_preemption_pays() -> None:
    played = Played(places=1)
    served(played, 20, 0.1)
    played.arrive(ask("a", prompt_token_ids=(1,) * 500))  # 0.5 s at the usual speed
    assert played.arrive(ask("urgent", "critical")) == []
    assert played.wake_s == pytest.approx(played.now + 0.5)
    played.now = played.wake_s
    assert played.on(TimeCame()) == ["a"]


def test_a_claim_does_not_wait_where_places_are_rare() -> None:
    played = Played(places=1)
    served(played, 20, 2.0)
    played.arrive(ask("a", prompt_token_ids=(1,) * 500))
    assert played.arrive(ask("urgent", "critical")) == ["a"]


def test_a_due_claim_whose_request_has_left_recalls_nothing() -> None:
    played = Played(places=1)
    served(played, 20, 0.1)
    played.arrive(ask("a", prompt_token_ids=(1,) * 500))
    played.arrive(ask("urgent", "critical"))
    played.on(Signalled(Signal("cancel", "urgent")))
    played.now += 1.0
    assert played.on(TimeCame()) == []
    assert played.ended["urgent"] == "cancelled"
