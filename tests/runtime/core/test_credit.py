"""Credit: every take can be undone, and no more is in transit than was granted."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.core.credit import CreditGate, Gates, cost_of
from sagellm.runtime.messages import Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Credit

GATE = CreditGate("engine", 0)


def request(name: str, num_tokens: int) -> Request:
    return Request(request_id=name, prompt_token_ids=(1,) * num_tokens)


def opened(capacity: Credit, block_size: int = 16) -> Gates:
    gates = Gates()
    gates.open(GATE, capacity, block_size)
    return gates


def test_a_request_costs_its_tokens_and_blocks() -> None:
    assert cost_of(request("r", 32), 16) == Credit(1, 32, 3)  # one more for the first token


def test_a_prefilled_request_costs_what_its_request_does() -> None:
    prefilled = Prefilled(request=request("r", 4), first=TokenEvent(request_id="r"))
    assert cost_of(prefilled, 4) == Credit(1, 4, 2)


def test_an_event_costs_one_request() -> None:
    assert cost_of(TokenEvent(request_id="r"), 16) == Credit(1, 0, 0)


def test_cached_tokens_cost_nothing() -> None:
    known = Request(request_id="r", prompt_token_ids=(1,) * 32, num_cached_tokens=16)
    assert cost_of(known, 16).tokens == 16


def test_blocks_run_out_before_requests() -> None:
    gates = opened(Credit(requests=10, blocks=4))
    assert gates.take(GATE, request("a", 30)) is None
    assert gates.take(GATE, request("b", 30)) is None
    assert gates.take(GATE, request("c", 1)) == GATE


def test_a_request_larger_than_all_credit_passes_alone() -> None:
    gates = opened(Credit(tokens=8))
    assert gates.take(GATE, request("large", 100)) is None
    assert gates.take(GATE, request("small", 1)) == GATE
    assert gates.give(GATE, ("large", 0))
    assert gates.take(GATE, request("small", 1)) is None


def test_giving_back_twice_changes_nothing() -> None:
    gates = opened(Credit(1))
    gates.take(GATE, request("a", 1))
    assert gates.give(GATE, ("a", 0))
    assert not gates.give(GATE, ("a", 0))
    assert gates.holders("a") == ()


def test_events_of_one_request_are_counted_one_by_one() -> None:
    gates = opened(Credit(2))
    event = TokenEvent(request_id="r")
    assert gates.take(GATE, event) is None
    assert gates.take(GATE, event) is None
    assert gates.take(GATE, event) == GATE
    gates.give(GATE, event.key)
    assert gates.take(GATE, event) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), max_size=40))
def test_what_is_under_way_never_exceeds_the_capacity(moves: list[tuple[int, int]]) -> None:
    gates = opened(Credit(requests=3, tokens=30), block_size=1)
    under_way: dict[str, int] = {}
    for number, num_tokens in moves:
        name = str(number)
        if name in under_way:
            assert gates.give(GATE, (name, 0))
            del under_way[name]
        elif gates.take(GATE, request(name, num_tokens)) is None:
            under_way[name] = num_tokens
        assert len(under_way) <= 3
        assert sum(under_way.values()) <= 30


def test_a_place_that_comes_later_is_taken_at_once_or_nothing_is() -> None:
    gates = Gates({"engine": "decode"})
    later = CreditGate("decode", 0)
    gates.open(GATE, Credit(4))
    gates.open(later, Credit(1), block_size=4)
    assert gates.take(GATE, request("a", 8), later) is None
    assert gates.reserved.is_at(later, ("a", 0))
    assert gates.take(GATE, request("b", 8), later) == later
    assert gates.holders("b") == ()
    assert gates.accounts[GATE].requests == 3
    assert gates.give(later, ("a", 0))
    assert gates.take(GATE, request("b", 8), later) is None


def test_a_gate_without_its_role_takes_no_request_until_it_has_it() -> None:
    gates, gate = Gates(), CreditGate("prefill", 0)
    gates.open(gate, Credit(requests=2))
    gates.assign(gate, is_on=False)
    request = Request(request_id="r")
    assert gates.take(gate, request) == gate
    assert gates.is_full("prefill")
    assert gates.full == {"prefill"}
    gates.close(gate)
    gates.reopen(gate)  # a replica that was lost comes back: its role stays
    assert gates.take(gate, request) == gate
    gates.assign(gate, is_on=True)
    assert gates.take(gate, request) is None
    assert gates.full == set()
