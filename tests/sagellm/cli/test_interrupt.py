import signal

import pytest
import trio
import trio.testing

from sagellm.cli.errors import drain_on_interrupt


async def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)
    await trio.testing.wait_all_tasks_blocked()


async def test_without_an_interrupt_nothing_is_cancelled() -> None:
    drain = trio.CancelScope()
    async with drain_on_interrupt(drain, "draining"):
        await trio.lowlevel.checkpoint()
    assert not drain.cancel_called


async def test_the_first_interrupt_drains_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    drain = trio.CancelScope()
    async with drain_on_interrupt(drain, "draining"):
        await interrupt()
        assert drain.cancel_called
    assert capsys.readouterr().err == "draining\n"


async def test_the_second_interrupt_stops() -> None:
    with pytest.RaisesGroup(KeyboardInterrupt):
        async with drain_on_interrupt(trio.CancelScope(), "draining"):
            await interrupt()
            await interrupt()
            await trio.sleep_forever()


async def test_afterwards_an_interrupt_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    async with drain_on_interrupt(trio.CancelScope(), "draining"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
