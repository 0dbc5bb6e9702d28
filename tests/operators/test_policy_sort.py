from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.operators.policies import POLICIES
from sagellm.operators.policy_sort import PolicySortOptions, build
from sagellm.runtime.feedback import (
    Backlog,
    CreditChanged,
    FirstToken,
    LoadReported,
    QueueChanged,
    RoomChanged,
)
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import (
    Arrival,
    Offer,
    OfferTaken,
    Report,
    Setup,
    Signal,
    Terminate,
    Wake,
)
from sagellm.runtime.port import EngineLoad

CREDIT = CreditChanged(node="prefill", num_left=1.0)


def ask(name: str, arrived_s: float = 0.0, **fields: Any) -> Any:
    return Request(request_id=name, stamps=Stamps(arrived_s=arrived_s), **fields)


def offered(outputs: Any) -> Any:
    return [
        item.request_id for output in outputs if isinstance(output, Offer) for item in output.items
    ]


def ended(outputs: Any) -> Any:
    events = [output.event for output in outputs if isinstance(output, Terminate)]
    return {event.key: event.finish_reason for event in events}


def told(outputs: Any) -> Any:
    return [
        output.feedback.backlog.num_requests for output in outputs if isinstance(output, Report)
    ]


def drain(sort: Any, outputs: Any = (), now: float = 0.0) -> Any:
    """Take the first request of each offer until no offer comes."""
    taken = []
    outputs = outputs or sort(CREDIT, now)
    while offers := [output for output in outputs if isinstance(output, Offer)]:
        item = offers[0].items[0]
        taken.append(item.request_id)
        outputs = sort(OfferTaken(item), now)
    return taken


@pytest.fixture
def sort(running: Any) -> Any:
    return running(build(PolicySortOptions(window=2), Setup("sort")))


def test_a_newcomer_is_offered(sort: Any) -> None:
    (tell, offer) = sort(Arrival(ask("a", arrived_s=1.0)), 3.0)
    assert tell == Report(QueueChanged(backlog=Backlog(num_requests=1, num_tokens=128)))
    assert offer.items[0].stamps == Stamps(arrived_s=1.0)


def test_taken_is_removed_and_the_rest_is_offered(sort: Any) -> None:
    sort(Arrival(ask("a")))
    offer = sort(Arrival(ask("b")))[-1]
    outputs = sort(OfferTaken(offer.items[0]))
    assert told(outputs) == [1]
    assert offered(outputs) == ["a"]
    assert drain(sort) == ["a"]
    assert len(sort.state.entries) == 0


def test_what_was_declined_is_not_offered_until_credit_changes(sort: Any) -> None:
    assert offered(sort(Arrival(ask("a")))) == ["a"]
    assert offered(sort(Arrival(ask("b")))) == ["b"]
    assert offered(sort(Arrival(ask("c")))) == []  # behind the window
    assert offered(sort(LoadReported(node="prefill", load=EngineLoad()))) == []
    assert offered(sort(CREDIT)) == ["a", "b"]


def test_a_candidate_that_enters_the_window_is_offered(sort: Any) -> None:
    for name in "abc":
        sort(Arrival(ask(name)))
    assert offered(sort(Signal("cancel", "a"))) == ["c"]


def test_cancel_ends_every_choice_held_and_nothing_else(sort: Any) -> None:
    for choice in range(2):
        sort(Arrival(ask("a", choice=choice)))
    sort(Arrival(ask("b")))
    outputs = sort(Signal("cancel", "a"))
    assert ended(outputs) == {("a", 0): "cancelled", ("a", 1): "cancelled"}
    assert told(outputs) == [1]
    assert sort(Signal("cancel", "a")) == ()


def test_a_signal_may_concern_one_choice(sort: Any) -> None:
    for choice in range(2):
        sort(Arrival(ask("a", choice=choice)))
    assert ended(sort(Signal("expire", "a", choice=1))) == {("a", 1): "expired"}


def test_it_wakes_for_the_earliest_expiry(sort: Any) -> None:
    sort(Arrival(ask("late", expires_s=9.0)))
    sort(Arrival(ask("soon", expires_s=5.0)))
    assert sort.wake_at == 5.0
    assert ended(sort(Wake(), 5.0)) == {("soon", 0): "expired"}
    assert sort.wake_at == 9.0


def test_an_expired_request_is_never_offered(sort: Any) -> None:
    outputs = sort(Arrival(ask("a", expires_s=1.0)), 1.0)
    assert ended(outputs) == {("a", 0): "expired"}
    assert offered(outputs) == []
    assert sort.wake_at is None


def test_taken_forgets_the_expiry(sort: Any) -> None:
    offer = sort(Arrival(ask("a", expires_s=1.0)))[-1]
    sort(OfferTaken(offer.items[0]))
    assert sort.wake_at is None


def test_a_reentered_request_keeps_its_turn(sort: Any) -> None:
    for name, arrived_s in (("b", 2.0), ("c", 3.0), ("a", 1.0)):
        sort(Arrival(ask(name, arrived_s)))
    assert drain(sort) == ["a", "b", "c"]


def test_a_request_that_is_late_gives_way_for_half_its_objective(running: Any) -> None:
    sort = running(build(PolicySortOptions(policy="slo_aware", window=4), Setup("sort")))
    sort(Arrival(ask("late", slo_ttft_s=1.0)))
    sort(Arrival(ask("tight", 0.5, slo_ttft_s=0.7)))
    sort(Arrival(ask("free")))
    sort(Arrival(ask("loose", 0.5, slo_ttft_s=5.0)))
    assert offered(sort(CREDIT, 0.9)) == ["late", "tight", "loose", "free"]
    assert offered(sort(CREDIT, 1.1)) == ["tight", "late", "loose", "free"]
    assert drain(sort, now=1.1) == ["tight", "late", "loose", "free"]


def test_a_request_that_is_very_late_is_in_no_hurry_any_more(running: Any) -> None:
    sort = running(build(PolicySortOptions(policy="slo_aware", window=4), Setup("sort")))
    sort(Arrival(ask("early", 0.0)))
    sort(Arrival(ask("lost", 0.5, slo_ttft_s=1.0)))
    sort(Arrival(ask("free", 1.0)))
    assert offered(sort(CREDIT, 1.9)) == ["lost", "early", "free"]
    sort(Arrival(ask("loose", 2.0, slo_ttft_s=5.0)), 2.0)
    assert drain(sort, now=2.1) == ["loose", "early", "lost", "free"]


def slack_sort(running: Any, late: str) -> Any:
    options = PolicySortOptions("least_slack", late=late, prefill_tokens_per_s=100.0, window=4)  # type: ignore[arg-type]
    return running(build(options, Setup("sort")))


def test_least_slack_demotes_what_is_late_behind_all_others(running: Any) -> None:
    sort = slack_sort(running, "demote")
    prompt = (1,) * 50
    sort(Arrival(ask("late", 0.0, slo_ttft_s=1.0, prompt_token_ids=prompt)))  # must start by 0.5
    sort(Arrival(ask("free", 0.4)), 0.4)
    assert offered(sort(CREDIT, 0.4)) == ["late", "free"]
    sort(Arrival(ask("tight", 0.4, slo_ttft_s=1.0, prompt_token_ids=prompt)), 0.6)
    assert drain(sort, now=0.6) == ["tight", "free", "late"]


def test_least_slack_counts_what_passes_between_queue_and_prefill(running: Any) -> None:
    """Prefills of 0.5 s had their first tokens after 0.7 s: 0.2 s are queue and transfer."""
    sort = slack_sort(running, "demote")
    for _ in range(20):
        sort(FirstToken(seconds=0.7, num_computed_tokens=50, computed_s=0.5))
    sort(Arrival(ask("late", 0.0, slo_ttft_s=1.0, prompt_token_ids=(1,) * 50)))
    sort(Arrival(ask("free")))
    assert offered(sort(CREDIT, 0.29)) == ["late", "free"]
    assert offered(sort(CREDIT, 0.31)) == ["free", "late"]


def test_least_slack_refuses_what_is_late_when_it_is(running: Any) -> None:
    sort = slack_sort(running, "refuse")
    prompt = (1,) * 50
    sort(Arrival(ask("late", 0.0, slo_ttft_s=1.0, prompt_token_ids=prompt)))
    assert sort.wake_at == pytest.approx(0.5, abs=2e-3)
    outputs = sort(Wake(), sort.wake_at)
    (end,) = [output.event for output in outputs if isinstance(output, Terminate)]
    assert (end.finish_reason, end.code) == ("refused", "slo_unreachable")
    assert end.retry_after_s >= 1.0
    assert told(outputs) == [0]
    assert offered(outputs) == []
    assert sort.wake_at is None
    sort(Arrival(ask("resumed", 0.0, slo_ttft_s=1.0, emitted_token_ids=(1,))), 5.0)
    assert drain(sort, now=5.0) == ["resumed"]  # its first token is out: it is not late


def test_what_was_declined_can_be_taken_after_its_time_has_passed(running: Any) -> None:
    sort = running(build(PolicySortOptions(policy="slo_aware"), Setup("sort")))
    (item,) = sort(Arrival(ask("late", slo_ttft_s=1.0)))[-1].items
    sort(Arrival(ask("other", slo_ttft_s=9.0)), 1.2)
    sort(OfferTaken(item), 1.2)
    assert [entry[3].request_id for entry in sort.state.entries] == ["other"]


def test_adaptive_changes_the_order_of_those_that_wait(running: Any) -> None:
    options = PolicySortOptions(policy="adaptive", busy_queued=2, overloaded_queued=9)
    sort = running(build(options, Setup("sort")))
    sort(Arrival(ask("free", 0.0)))
    outputs = sort(Arrival(ask("tight", 1.0, slo_ttft_s=1.0)), 1.0)
    assert offered(outputs) == ["tight", "free"]
    assert drain(sort, now=1.0) == ["tight", "free"]
    assert sort.state.level == 0


def test_adaptive_lets_those_pass_that_are_still_in_time(running: Any) -> None:
    options = PolicySortOptions(policy="adaptive", busy_queued=2, overloaded_queued=9, window=2)
    sort = running(build(options, Setup("sort")))
    for name, num_tokens, slo_ttft_s in (("a", 100, 1.0), ("b", 200, 1.0), ("c", 300, 9.0)):
        prompt = (1,) * num_tokens
        sort(Arrival(ask(name, 0.0, prompt_token_ids=prompt, slo_ttft_s=slo_ttft_s)))
    sort(Arrival(ask("free", 0.0)))
    assert sort.state.level == 1
    assert offered(sort(CREDIT, 0.1)) == ["a", "b"]
    assert offered(sort(CREDIT, 0.85)) == ["a", "c"]  # b would need 0.2 s of 0.15 s
    assert drain(sort, now=0.95) == ["c", "free", "a", "b"]


def test_a_users_order(running: Any) -> None:
    functions = {"longest": lambda request: -len(request.prompt)}
    options = PolicySortOptions(policy="own", function="longest")
    sort = running(build(options, Setup("sort", functions=functions)))
    for prompt in ("x", "xxx", "xx"):
        sort(Arrival(ask(prompt, prompt=prompt)))
    assert drain(sort) == ["xxx", "xx", "x"]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda r: 1 / 0, "raised ZeroDivisionError"),
        (lambda r: "high", "returned a value of type str; a number was wanted"),
        (lambda r: float("nan"), "returned NaN; a number was wanted"),
        (lambda r: None, "returned None; a number was wanted"),
    ],
)
def test_a_rank_that_is_none_fails_its_request_only(running: Any, function: Any, says: str) -> None:
    options = PolicySortOptions(policy="own", function="rank")
    sort = running(build(options, Setup("sort", functions={"rank": function})))
    (output,) = sort(Arrival(ask("a")))
    assert output.event.finish_reason == "failed"
    assert output.event.error == f"sort: the function rank {says}"
    assert len(sort.state.entries) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PolicySortOptions(policy="own"), "belong together"),
        (PolicySortOptions(function="rank"), "belong together"),
        (PolicySortOptions(aging_s=1.0), "fifo does not use aging_s.*priority"),
        (PolicySortOptions(policy="own", function="rank", aging_s=1.0), "own does not use aging_s"),
        (PolicySortOptions(policy="own", function="rnak"), "did you mean rank"),
        (
            PolicySortOptions(policy="adaptive", busy_queued=200),
            "sort: busy_queued=200 must be below",
        ),
        (replace(PolicySortOptions(), policy="fifi"), "did you mean fifo"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(options, Setup("sort", functions={"rank": lambda request: 0}))


REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 10),
        st.integers(0, 4),
        st.integers(0, 50),
        st.none() | st.floats(0, 10),
        st.none() | st.floats(0, 4),
    ),
    max_size=40,
)
STEPS = st.lists(st.sampled_from(["take", "decline", "cancel"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), REQUESTS, STEPS)
def test_no_request_is_lost_or_doubled(running: Any, policy: str, drawn: Any, steps: Any) -> None:
    thresholds = {"busy_queued": 3, "overloaded_queued": 9} if policy == "adaptive" else {}
    sort = running(build(PolicySortOptions(policy=policy, window=3, **thresholds), Setup("sort")))
    seen, steps = [], iter(steps)
    for number, (arrived_s, priority, length, expires_s, weight) in enumerate(drawn):
        request = ask(
            str(number),
            arrived_s,
            priority=priority,
            prompt_token_ids=(1,) * length,
            expires_s=expires_s,
            cost_budget=weight,
        )
        outputs = sort(Arrival(request), number / 4)
        step = next(steps, "decline")
        if step == "cancel":
            seen += [key[0] for key in ended(outputs)]
            outputs = sort(Signal("cancel", str(number // 2)), number / 4)
        while step == "take" and (offers := [o for o in outputs if isinstance(o, Offer)]):
            seen += [key[0] for key in ended(outputs)]
            seen.append(offers[-1].items[-1].request_id)
            outputs = sort(OfferTaken(offers[-1].items[-1]), number / 4)
        seen += [key[0] for key in ended(outputs)]
    held = [entry[3].request_id for entry in sort.state.entries]
    assert sorted(seen + held) == sorted(str(number) for number in range(len(drawn)))
    assert list(sort.state.entries) == sorted(sort.state.entries)
    expiring = [entry for entry in sort.state.entries if entry[3].expires_s is not None]
    assert sorted(number for _, number, _ in sort.state.expiries) == sorted(e[2] for e in expiring)


def test_one_that_expires_as_another_comes_is_told_of(sort: Any) -> None:
    """The number of waiting requests stays the same, the requests change."""
    sort(Arrival(ask("a", prompt_token_ids=(1,) * 1000, expires_s=5.0)))
    outputs = sort(Arrival(ask("b", prompt_token_ids=(1,) * 10)), 5.0)
    (backlog,) = [output.feedback.backlog for output in outputs if isinstance(output, Report)]
    assert (backlog.num_requests, backlog.num_prompt_tokens) == (1, 10)


def backlog_of(outputs: Any) -> Backlog:
    (backlog,) = [output.feedback.backlog for output in outputs if isinstance(output, Report)]
    return backlog


def test_a_queue_counts_the_time_in_which_engines_are_full(sort: Any) -> None:
    prompt = (1,) * 30
    drain(sort, sort(Arrival(ask("a", prompt_token_ids=prompt)), 0.0))
    full = backlog_of(sort(RoomChanged(node="sort", has_room=False), 1.0))
    assert (full.num_full, full.busy_s, full.num_served, full.is_open) == (1, 0.0, 0, False)
    has_room = backlog_of(sort(RoomChanged(node="sort", has_room=True), 4.0))
    assert (has_room.num_full, has_room.busy_s, has_room.is_open) == (0, 3.0, True)
    assert (has_room.num_served, has_room.num_served_tokens) == (1, 30)  # room for one more
    sort(RoomChanged(node="sort", has_room=False), 9.0)
    waiting = backlog_of(sort(Arrival(ask("b")), 10.0))
    assert waiting.busy_s == 4.0


# ---- requests that do not want to wait -----------------------------------------------------------


def impatient(sort: Any, name: str, now: float, **fields: Any) -> tuple[Any, ...]:
    return sort(Arrival(ask(name, now, no_queue=True, **fields)), now)


def test_a_request_that_will_not_wait_is_offered_once_and_then_refused(running: Any) -> None:
    sort = running(build(PolicySortOptions(), Setup("sort")))
    assert offered(impatient(sort, "r", 5.0)) == ["r"]
    assert sort.wake_at == 5.0
    outputs = sort(Wake(), 5.0)
    (end,) = [output.event for output in outputs if isinstance(output, Terminate)]
    assert (end.finish_reason, end.code, end.retry_after_s) == ("refused", "would_wait", 1.0)
    assert told(outputs) == [0]
    assert sort.wake_at is None


def test_a_request_that_will_not_wait_is_sent_where_there_is_room(running: Any) -> None:
    sort = running(build(PolicySortOptions(), Setup("sort")))
    (offer,) = [one for one in impatient(sort, "r", 5.0) if isinstance(one, Offer)]
    sort(OfferTaken(offer.items[0]), 5.0)
    assert sort.wake_at is None
    assert not any(isinstance(one, Terminate) for one in sort(Wake(), 5.0))


def test_others_wait_on_beside_it(running: Any) -> None:
    sort = running(build(PolicySortOptions(), Setup("sort")))
    sort(Arrival(ask("patient", 1.0)), 1.0)
    impatient(sort, "r", 5.0)
    outputs = sort(Wake(), 5.0)
    assert [one.event.request_id for one in outputs if isinstance(one, Terminate)] == ["r"]
    assert offered(sort(CREDIT, 6.0)) == ["patient"]


@pytest.mark.parametrize("again", [{"epoch": 1}, {"emitted_token_ids": (7,)}])
def test_a_request_that_resumes_may_wait(running: Any, again: Any) -> None:
    sort = running(build(PolicySortOptions(), Setup("sort")))
    impatient(sort, "r", 5.0, **again)
    assert sort.wake_at is None


def test_an_expired_request_is_expired_also_if_it_would_not_wait(running: Any) -> None:
    sort = running(build(PolicySortOptions(), Setup("sort")))
    outputs = impatient(sort, "r", 5.0, expires_s=4.0)
    (end,) = [output.event for output in outputs if isinstance(output, Terminate)]
    assert end.finish_reason == "expired"
