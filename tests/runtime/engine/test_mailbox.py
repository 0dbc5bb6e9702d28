"""A mailbox: batches in order, a bound that never blocks the engine, an end."""

import pytest
import trio
import trio.testing

from sagellm.runtime.engine.output import MAX_BATCHES, Mailbox
from sagellm.runtime.messages import TokenEvent


def event(position):
    return TokenEvent(request_id="r", position=position)


def filled(num_batches, on_read=lambda: None):
    mailbox = Mailbox(on_read)
    for position in range(num_batches):
        mailbox.post(event(position))
        mailbox.flush()
    return mailbox


async def test_what_is_posted_in_one_step_is_one_batch():
    mailbox = Mailbox(lambda: None)
    mailbox.post(event(0))
    mailbox.post(event(1))
    mailbox.flush()
    mailbox.flush()
    mailbox.close()
    assert [batch async for batch in mailbox] == [(event(0), event(1))]


async def test_a_reader_waits_for_the_next_batch():
    mailbox, read = Mailbox(lambda: None), []

    async def reader():
        read.extend([batch async for batch in mailbox])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        mailbox.post(event(0))
        mailbox.flush()
        await trio.testing.wait_all_tasks_blocked()
        mailbox.close()
    assert read == [(event(0),)]


async def test_reading_from_a_full_mailbox_tells_the_engine():
    told = []
    mailbox = filled(MAX_BATCHES, lambda: told.append(True))
    assert mailbox.is_full
    await anext(mailbox)
    assert told == [True]
    assert not mailbox.is_full
    await anext(mailbox)
    assert told == [True]


async def test_the_end_comes_after_what_is_left():
    mailbox = filled(1)
    mailbox.post(event(1))
    mailbox.close()
    assert len([batch async for batch in mailbox]) == 2
    with pytest.raises(StopAsyncIteration):
        await anext(mailbox)


async def test_a_cancelled_reader_loses_nothing():
    mailbox = filled(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(mailbox)
    assert await anext(mailbox) == (event(0),)
