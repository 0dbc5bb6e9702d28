"""The same graph from asyncio and from plain threads."""

import asyncio
import subprocess
import sys
import threading

import pytest
import trio

from sagellm import Graph, GraphError, Sampling, ops
from sagellm.session import RequestError

SHORT = Sampling(max_tokens=5, ignore_eos=True)


def joint() -> Graph:
    graph = Graph("g").engine("g", device="null", model="null", decode_step_s=0.001)
    graph >> ops.generate(engine="g") >> ops.metrics_sink()
    return graph


def test_asyncio_streams_tokens() -> None:
    async def main() -> list[int]:
        async with joint().open() as session:
            return [event.position async for event in session.stream([1], sampling=SHORT)]

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_one_opening_under_trio_then_asyncio_then_blocking() -> None:
    """Each way of entering leaves nothing open, in any order."""
    opening = joint().open()

    async def ask() -> int:
        async with opening as session:
            return len((await session.generate([1], sampling=SHORT)).token_ids)

    before = threading.active_count()
    assert (trio.run(ask), asyncio.run(ask()), trio.run(ask)) == (5, 5, 5)
    with opening as session:
        assert len(session.generate([1], sampling=SHORT).token_ids) == 5
    assert threading.active_count() <= before + 1  # trio keeps a thread for the next use
    with pytest.raises(RequestError, match="has stopped"):
        session.generate([1], sampling=SHORT)


def test_asyncio_serves_many_at_once() -> None:
    async def main() -> list[int]:
        async with joint().open() as session:
            asked = (session.generate([1], sampling=SHORT) for _ in range(20))
            answers = await asyncio.gather(*asked)
            assert session.statistics().num_requests == 20
            return [len(answer.token_ids) for answer in answers]

    assert asyncio.run(main()) == [5] * 20


def test_leaving_an_asyncio_stream_cancels_it() -> None:
    async def main() -> dict[str, int]:
        async with joint().open() as session:
            async with session.stream([1], sampling=Sampling(max_tokens=8000)) as stream:
                async for _ in stream:
                    break
            await session.idle()
            return dict(session.statistics().ended)

    assert asyncio.run(main()) == {"cancelled": 1}


def test_an_asyncio_task_that_is_cancelled_ends_its_request() -> None:
    async def main() -> dict[str, int]:
        async with joint().open() as session:
            task = asyncio.create_task(session.generate([1], sampling=Sampling(max_tokens=8000)))
            await session.generate([1], sampling=SHORT)  # by now the first one runs too
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await session.idle()
            return dict(session.statistics().ended)

    assert asyncio.run(main()) == {"cancelled": 1, "length": 1}


def test_a_stream_is_read_to_its_end_twice() -> None:
    with joint().open() as session:
        stream = session.stream([1], sampling=SHORT)
        assert len(list(stream)) == 5
        assert list(stream) == []


def test_leaving_ends_a_stream_that_nobody_reads_on() -> None:
    with joint().open() as session:
        stream = session.stream([1], sampling=Sampling(max_tokens=8000))
        next(stream)
    assert [event.finish_reason for event in stream][-1] == "cancelled"


def test_a_thread_streams_and_generates() -> None:
    with joint().open() as session:
        assert [event.position for event in session.stream([1], sampling=SHORT)] == [0, 1, 2, 3, 4]
        assert len(session.generate([1], sampling=SHORT).token_ids) == 5
        assert [answer.choice for answer in session.generate_all([1], sampling=SHORT)] == [0]


def test_threads_share_a_session() -> None:
    answers = []
    with joint().open() as session:

        def ask() -> None:
            answers.append(session.generate([1], sampling=SHORT))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(answer.token_ids) for answer in answers] == [5] * 8


def test_cancel_from_a_thread() -> None:
    with joint().open() as session:
        stream = session.stream([1], sampling=Sampling(max_tokens=8000), request_id="r")
        next(stream)
        session.cancel("r")
        assert [event.finish_reason for event in stream][-1] == "cancelled"


def test_errors_cross_the_bridge() -> None:
    with joint().open() as session:
        with pytest.raises(RequestError, match="empty"):
            session.generate([])
        with pytest.raises(RequestError, match="did you mean"):
            list(session.stream([1], prioritty=1))


def test_a_bad_graph_fails_on_entry() -> None:
    with pytest.raises(GraphError, match="block_size"):
        Graph.load("joint").open(set={"g.block_sise": 1}).__enter__()


def test_closing_leaves_no_thread() -> None:
    before = threading.active_count()
    with joint().open() as session:
        session.generate([1], sampling=SHORT)
    assert threading.active_count() <= before


FORGETS = """
from sagellm import Graph, Sampling, ops
graph = Graph("g").engine("g", device="null", model="null") >> ops.generate(engine="g")
session = graph.open(executor={executor!r}).__enter__()
print(len(session.generate([1], sampling=Sampling(max_tokens=3, ignore_eos=True)).token_ids))
"""


@pytest.mark.parametrize("executor", ["tasks", "processes"])
def test_a_program_that_forgets_to_close_ends(executor: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGETS.format(executor=executor)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
