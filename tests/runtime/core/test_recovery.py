"""Requests whose engine was lost: which enter again, which are tried alone, which end."""

from typing import Any

from msgspec.structs import replace

from sagellm.runtime.core.recovery import QUARANTINE_S, Recovery
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.runtime.port import LossCause
from sagellm.runtime.sampling import Sampling


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(name: str, num_emitted: int = 0, **fields: Any) -> Request:
    fields = {"prompt_token_ids": (1, 2), **fields}
    return Request(request_id=name, emitted_token_ids=(7,) * num_emitted, **fields)


def judge(recovery: Recovery, request: Request, cause: LossCause = "death") -> str:
    return recovery.judge("g", request, cause)


def token(name: str) -> TokenEvent:
    return TokenEvent(request_id=name, token_ids=(1,))


def test_who_has_advanced_goes_in_at_once_however_often() -> None:
    recovery = Recovery(Clock())
    assert [judge(recovery, ask("a", n)) for n in (1, 2, 3, 9)] == ["now"] * 4


def test_who_was_only_on_the_way_is_no_suspect() -> None:
    recovery = Recovery(Clock())
    assert [judge(recovery, ask("a"), "none") for _ in range(9)] == ["now"] * 9


def test_suspects_are_tried_one_at_a_time() -> None:
    recovery = Recovery(Clock())
    assert [judge(recovery, ask(name)) for name in "abc"] == ["later"] * 3
    assert recovery.next() == ("g", ask("a"))
    assert recovery.next() is None
    recovery.note(token("b"))
    assert recovery.next() is None
    recovery.note(token("a"))
    assert recovery.next() == ("g", ask("b"))
    recovery.forget(("b", 0))
    assert recovery.next() == ("g", ask("c"))


def test_a_second_death_on_trial_is_quarantined_and_nobody_else() -> None:
    recovery = Recovery(Clock())
    for name in "ab":
        judge(recovery, ask(name))
    assert recovery.next() == ("g", ask("a"))
    assert judge(recovery, ask("a")) == "never"
    assert recovery.next() == ("g", ask("b"))


def test_the_end_of_a_link_is_half_a_death() -> None:
    recovery = Recovery(Clock())
    assert [judge(recovery, ask("a"), "link") for _ in range(4)] == ["later"] * 3 + ["never"]
    assert judge(recovery, ask("b"), "link") == "later"
    assert judge(recovery, ask("b")) == "later"
    assert judge(recovery, ask("b")) == "never"


def test_a_token_between_two_deaths_clears_a_suspect() -> None:
    recovery = Recovery(Clock())
    assert judge(recovery, ask("a", 3)) == "now"
    assert judge(recovery, ask("a", 3)) == "later"
    assert judge(recovery, ask("a", 4)) == "now"
    assert judge(recovery, ask("a", 4)) == "later"


def test_the_like_of_a_quarantined_request_is_refused_for_ten_minutes() -> None:
    clock = Clock()
    recovery = Recovery(clock)
    poison = ask("a", sampling=Sampling(seed=1))
    judge(recovery, poison)
    judge(recovery, poison)
    again = replace(poison, request_id="b", sampling=Sampling(seed=2))
    assert recovery.is_blocked(again)
    assert not recovery.is_blocked(replace(again, prompt_token_ids=(1, 3)))
    clock.now = QUARANTINE_S - 1
    assert recovery.is_blocked(again)
    clock.now = QUARANTINE_S + 1
    assert not recovery.is_blocked(again)


def test_a_suspect_that_nobody_wants_any_more_is_dropped() -> None:
    recovery = Recovery(Clock())
    judge(recovery, ask("a"))
    judge(recovery, ask("b"))
    assert recovery.drop(lambda key: key[0] == "a") == (ask("a"),)
    assert recovery.next() == ("g", ask("b"))


def test_a_request_does_not_return_for_ever() -> None:
    recovery = Recovery(Clock())
    assert {judge(recovery, ask("a", n)) for n in range(1, 101)} == {"now"}
    assert judge(recovery, ask("a", 101)) == "spent"


def test_what_has_ended_is_forgotten() -> None:
    recovery = Recovery(Clock())
    judge(recovery, ask("a"))
    recovery.next()
    recovery.forget(("a", 0))
    assert not recovery.is_under_way
    assert recovery.next() is None
    assert not any(held for held in vars(recovery).values() if isinstance(held, dict))


def test_the_gap_is_from_the_loss_to_the_next_token() -> None:
    clock = Clock()
    recovery = Recovery(clock)
    judge(recovery, ask("a", 1))
    clock.now = 1.5
    judge(recovery, ask("a", 1), "none")
    recovery.note(TokenEvent(request_id="a", text="held back"))
    recovery.note(token("b"))
    clock.now = 3.0
    recovery.note(token("a"))
    recovery.note(token("a"))
    assert (recovery.gaps_s.num_samples, recovery.gaps_s.total) == (1, 3.0)
    assert not recovery.is_under_way
