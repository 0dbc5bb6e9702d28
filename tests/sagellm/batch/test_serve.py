import json
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sagellm.batch import BatchRun, OutputFile
from sagellm.batch.prompt_lines import LineRequest
from sagellm.runtime.messages import Answer

PATH = Path("answers.jsonl")  # the path in error messages


class Kept(BytesIO):
    """A file whose content stays readable after its close."""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.getvalue().splitlines()]


async def echo(ask: LineRequest) -> Sequence[Answer]:
    await trio.lowlevel.checkpoint()
    return [Answer(request_id=str(ask.id), text=str(ask.prompt))]


async def numbered(*lines: dict[str, Any] | bytes) -> AsyncIterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        yield number, line if isinstance(line, bytes) else json.dumps(line).encode()


def batch(file: Kept, reply: Any = echo, answered: frozenset[str] = frozenset()) -> BatchRun:
    return BatchRun(reply, OutputFile(file, PATH, answered), num_in_flight=2)


async def test_every_line_gets_a_line() -> None:
    file = Kept()
    counts = await batch(file).serve(numbered({"id": "a", "prompt": "x"}, {"prompt": "y"}))
    assert {(line["id"], line["text"]) for line in file.lines()} == {("a", "x"), (2, "y")}
    assert (counts.num_answered, counts.num_failed) == (2, 0)


async def test_a_malformed_line_does_not_lose_the_others() -> None:
    file = Kept()
    counts = await batch(file).serve(numbered({"prompt": "x"}, b"{", {"prompt": "y"}))
    errors = {line["id"]: line["error"] for line in file.lines() if "error" in line}
    assert errors[2]["type"] == "malformed"
    assert errors[2]["message"].startswith("line 2: ")
    assert (counts.num_answered, counts.num_failed) == (2, 1)


async def test_a_second_use_of_an_id_is_refused() -> None:
    file = Kept()
    await batch(file).serve(numbered({"id": 1, "prompt": "x"}, {"id": "1", "prompt": "y"}))
    (error,) = [line["error"] for line in file.lines() if "error" in line]
    assert error["message"] == "line 2: id '1' is that of line 1"


async def test_what_was_answered_before_is_skipped() -> None:
    file = Kept()
    running = batch(file, answered=frozenset({"a"}))
    counts = await running.serve(numbered({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}))
    assert [line["id"] for line in file.lines()] == ["b"]
    assert (counts.num_skipped, counts.num_done) == (1, 2)


async def test_a_refusal_before_the_graph_is_an_error_with_the_line() -> None:
    async def refuse(ask: LineRequest) -> Sequence[Answer]:
        raise ValueError("temperature is -1")

    file = Kept()
    await batch(file, refuse).serve(numbered({"prompt": "x"}))
    (line,) = file.lines()
    assert line["error"] == {"message": "line 1: temperature is -1", "type": "refused"}


async def test_no_more_than_the_bound_are_in_flight() -> None:
    running, peak = 0, 0

    async def count(ask: LineRequest) -> Sequence[Answer]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await trio.testing.wait_all_tasks_blocked()  # every task that can run has run
        running -= 1
        return await echo(ask)

    await batch(Kept(), count).serve(numbered(*[{"prompt": "x"}] * 9))
    assert peak == 2


async def test_refused_lines_give_their_slot_back() -> None:
    file = Kept()
    await batch(file).serve(numbered(*[b"{"] * 5, {"prompt": "x"}))
    assert len(file.lines()) == 6


async def test_draining_finishes_what_runs_and_reads_no_more() -> None:
    drain = trio.CancelScope()

    async def answer(ask: LineRequest) -> Sequence[Answer]:
        drain.cancel()
        return await echo(ask)

    file = Kept()
    with trio.fail_after(5):
        counts = await batch(file, answer).serve(numbered(*[{"prompt": "x"}] * 50), drain)
    assert 1 <= counts.num_answered <= 3
    assert len(file.lines()) == counts.num_answered


@pytest.mark.parametrize(("line", "is_error"), [({"prompt": "x"}, False), (b"{", True)])
async def test_each_line_is_reported(line: Any, is_error: bool) -> None:
    seen: list[dict[str, Any] | None] = []
    await BatchRun(echo, OutputFile(Kept(), PATH), report=seen.append).serve(numbered(line))
    assert ["error" in (written or {}) for written in seen] == [is_error]


async def test_a_skipped_line_is_reported_as_none() -> None:
    seen: list[dict[str, Any] | None] = []
    running = BatchRun(echo, OutputFile(Kept(), PATH, frozenset({"a"})), report=seen.append)
    await running.serve(numbered({"id": "a", "prompt": "x"}))
    assert seen == [None]
