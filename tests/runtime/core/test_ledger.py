"""The ledger finds every way in which its accounts can fail to balance."""

import pytest

from sagellm.runtime.core.accounting import Ledger, LedgerError
from sagellm.runtime.messages import Answer, Forked, TokenEvent

KEY = ("r", 0)


def tokens(position: int, *token_ids: int, end: str | None = None) -> TokenEvent:
    return TokenEvent(
        request_id="r",
        position=position,
        token_ids=token_ids,
        finish_reason=end,  # type: ignore[arg-type]
    )


def accepted(**options: bool) -> Ledger:
    ledger = Ledger(**options)
    ledger.accept(KEY)
    return ledger


def test_a_served_request_balances() -> None:
    ledger = accepted()
    ledger.record(tokens(0, 5))
    ledger.record(tokens(1, 6, 7, end="stop"))
    ledger.check()
    assert (ledger.num_tokens, ledger.ended["stop"]) == (3, 1)


def test_a_request_that_never_ends_is_found() -> None:
    ledger = accepted()
    with pytest.raises(LedgerError, match="never ended"):
        ledger.check()


def test_a_gap_is_found() -> None:
    ledger = accepted()
    ledger.record(tokens(1, 6, end="stop"))
    with pytest.raises(LedgerError, match="position 1, not 0"):
        ledger.check()


def test_a_repeated_token_is_found_even_where_gaps_are_allowed() -> None:
    ledger = accepted(gaps=True)
    ledger.record(tokens(3, 6))
    ledger.record(tokens(3, 6, end="stop"))
    with pytest.raises(LedgerError, match="position 3, not 4"):
        ledger.check()


def test_a_second_end_is_found() -> None:
    ledger = accepted()
    ledger.record(tokens(0, end="stop"))
    ledger.record(tokens(0, end="cancelled"))
    with pytest.raises(LedgerError, match="had ended"):
        ledger.check()


def test_a_request_accepted_twice_is_found() -> None:
    ledger = accepted()
    ledger.accept(KEY)
    ledger.record(tokens(0, end="stop"))
    with pytest.raises(LedgerError, match="accepted twice"):
        ledger.check()


def test_an_answer_ends_its_request() -> None:
    ledger = accepted()
    ledger.record(Answer(request_id="r", token_ids=(1, 2), finish_reason="length"))
    ledger.check()
    assert ledger.num_tokens == 2


def test_each_choice_of_a_fork_ends() -> None:
    ledger = accepted()
    ledger.fork(Forked(request_id="r", num_choices=2))
    ledger.record(tokens(0, end="stop"))
    assert ledger.num_open == 1
    ledger.record(TokenEvent(request_id="r", choice=1, finish_reason="stop"))
    ledger.check()


def test_a_resumed_request_goes_on_where_it_was() -> None:
    ledger = Ledger()
    ledger.accept(KEY, position=4)
    ledger.record(tokens(4, 9, end="stop"))
    ledger.check()
    assert ledger.num_open == 0
