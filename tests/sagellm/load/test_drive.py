from itertools import islice

import pytest
import trio
from trio.testing import MockClock

from sagellm.load import LoadDriver, RequestRecord
from sagellm.load.workload import PlannedRequest, closed_loop, poisson

SERVICE_S = 1.0


def drive() -> LoadDriver:
    """A load on a server that takes a second for everything, in virtual time."""
    started_s = trio.current_time()

    def now_s() -> float:
        return trio.current_time() - started_s

    async def send(number: int, arrival: PlannedRequest, planned_s: float) -> RequestRecord:
        record = RequestRecord(number, planned_s, now_s(), arrival.input_len, arrival.output_len)
        await trio.sleep(SERVICE_S)
        record.ended_s = now_s()
        return record

    return LoadDriver(send, now_s)


async def test_a_closed_loop_keeps_so_many_under_way(autojump_clock: MockClock) -> None:
    load = drive()
    await load.closed(islice(closed_loop(1, 1, 0, 0), 10), concurrency=3)
    assert load.num_open_peak == 3
    assert sorted(record.number for record in load.records) == list(range(10))
    assert trio.current_time() == pytest.approx(4.0)


async def test_a_closed_loop_ends_with_its_time(autojump_clock: MockClock) -> None:
    load = drive()
    await load.closed(closed_loop(1, 1, 0, 0), concurrency=2, until_s=2.5)
    assert len(load.records) == 6  # open requests at the end are awaited
    assert trio.current_time() == pytest.approx(3.0)


async def test_an_open_loop_sends_at_its_times_however_slow_the_server(
    autojump_clock: MockClock,
) -> None:
    load, arrivals = drive(), list(islice(poisson(closed_loop(1, 1, 0, 0), 50.0, seed=0), 200))
    await load.open(iter(arrivals))
    sent = sorted(load.records, key=lambda record: record.number)
    assert [record.sent_s for record in sent] == pytest.approx([one.at_s for one in arrivals])
    assert all(record.lag_s == pytest.approx(0) for record in sent)
    assert load.num_open_peak > 30  # a rate of 50 and a second each: about 50


async def test_stopped_it_sends_no_more_and_waits_for_the_rest(autojump_clock: MockClock) -> None:
    for is_open in (True, False):
        load = drive()
        async with trio.open_nursery() as nursery:
            if is_open:
                nursery.start_soon(load.open, poisson(closed_loop(1, 1, 0, 0), 10.0, 0))
            else:
                nursery.start_soon(load.closed, closed_loop(1, 1, 0, 0), 4)
            await trio.sleep(2.5)
            load.stop.cancel()
        sent = [record.sent_s for record in load.records]
        assert max(sent) <= 2.5
        assert all(record.ended_s == pytest.approx(record.sent_s + 1) for record in load.records)
        assert load.num_open == 0


async def test_each_request_is_reported(autojump_clock: MockClock) -> None:
    load, told = drive(), []
    load.report = told.append
    await load.closed(islice(closed_loop(1, 1, 0, 0), 5), concurrency=2)
    assert told == load.records
