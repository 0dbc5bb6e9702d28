"""A batch goes on after the death of its process: each request has one result."""

from pathlib import Path

import pytest
from batch_calls import begin, chat_line, client_of, contents, ended, num_stored, results, wait
from gateway_process import served_process

NUM = 48
LINES = [chat_line(number) for number in range(NUM)]
FEW = ("--limit", "num_batch_calls=2")  # so that the batch takes long enough to be interrupted


def served(folder: Path, *options: str, **fields: bool):  # type: ignore[no-untyped-def]
    return served_process("--data-dir", str(folder), *FEW, *options, graph="sage-tiny", **fields)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The answers of a batch that nothing interrupts."""
    with served(tmp_path_factory.mktemp("whole")) as gateway, client_of(gateway.url) as client:
        batch = ended(client, begin(client, LINES).id)
        return contents(results(client, batch.output_file_id))


@pytest.mark.parametrize("server", ["hypercorn", pytest.param("uvicorn", marks=pytest.mark.soak)])
def test_a_killed_server_answers_the_rest_after_its_restart(
    server: str, tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    with (
        served(tmp_path, "--server", server, ends_killed=True) as gateway,
        client_of(gateway.url) as client,
    ):
        began = begin(client, LINES)
        wait(lambda: num_stored(tmp_path), lambda num: num >= NUM // 4)
        gateway.process.kill()
    before = num_stored(tmp_path)
    assert before < NUM
    with served(tmp_path, "--server", server) as gateway, client_of(gateway.url) as client:
        batch = ended(client, began.id)
        found = results(client, batch.output_file_id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert len(found) == NUM
    assert contents(found) == uninterrupted
    counts = batch.request_counts
    assert counts is not None
    assert (counts.total, counts.completed, counts.failed) == (NUM, NUM, 0)


def test_a_drained_server_leaves_the_rest_to_the_next_start(
    tmp_path: Path, uninterrupted: dict[str, str]
) -> None:
    with served(tmp_path) as gateway, client_of(gateway.url) as client:
        began = begin(client, LINES)
        wait(lambda: num_stored(tmp_path), lambda num: num >= NUM // 4)
    assert num_stored(tmp_path) < NUM
    with served(tmp_path) as gateway, client_of(gateway.url) as client:
        found = results(client, ended(client, began.id).output_file_id)
    assert len(found) == NUM
    assert contents(found) == uninterrupted
