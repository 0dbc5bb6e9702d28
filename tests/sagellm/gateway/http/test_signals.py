"""Which signals end a server, and which it only notes."""

import os
import signal

import pytest
import trio
from logged import logged

from sagellm.gateway.http import drain


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
async def test_these_end_it(number: signal.Signals) -> None:
    with trio.fail_after(5), drain.ending_signals() as received:
        os.kill(os.getpid(), number)
        assert await anext(received) == number


async def test_others_are_noted_and_end_nothing() -> None:
    with logged() as lines, trio.move_on_after(0.1), drain.ending_signals() as received:
        for number in drain.NOTED:
            os.kill(os.getpid(), number)
        raise AssertionError(await anext(received))
    assert {line["event"] for line in lines} == {"signal_ignored"}
    assert {line["signal"] for line in lines} == {"SIGHUP", "SIGUSR1", "SIGUSR2"}


async def test_a_terminal_that_goes_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_is_in_terminal", lambda: True)
    with trio.fail_after(5), drain.ending_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        assert await anext(received) == signal.SIGHUP
