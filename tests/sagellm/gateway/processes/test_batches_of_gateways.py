"""Two gateway processes and one batch: one of them works on it, and the other takes over."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from batch_calls import begin, client_of, completion_line, ended, num_stored, results, wait
from gateway_process import ServedProcess, served_process

NUM = 300


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ServedProcess]:
    with served_process("--gateways", "2", "--data-dir", str(tmp_path)) as served:
        yield served


def holders(served: ServedProcess) -> list[psutil.Process]:
    """The processes that have the lock of a batch open."""
    found = []
    for child in served.process.children(recursive=True):
        if any(file.path.endswith(".lock") for file in child.open_files()):
            found.append(child)
    return found


def test_a_batch_outlives_the_gateway_that_works_on_it(
    gateway: ServedProcess, tmp_path: Path
) -> None:
    with client_of(gateway.url) as client:
        lines = [completion_line(number, max_tokens=8) for number in range(NUM)]
        began = begin(client, lines)
        wait(lambda: num_stored(tmp_path), lambda num: num >= 20)
        [worker] = holders(gateway)
        worker.kill()
    assert num_stored(tmp_path) < NUM
    with client_of(gateway.url) as client:
        batch = ended(client, began.id)
        found = results(client, batch.output_file_id)
    assert batch.status == "completed"
    assert sorted(line["custom_id"] for line in found) == sorted(
        line["custom_id"] for line in lines
    )


def test_every_gateway_answers_for_every_batch(gateway: ServedProcess) -> None:
    began = []
    for number in range(6):
        with client_of(gateway.url) as client:  # a new connection, for either gateway
            began.append(begin(client, [completion_line(number)]))
    for batch in began:
        for _ in range(4):
            with client_of(gateway.url) as client:
                assert ended(client, batch.id).status == "completed"
                assert len(client.batches.list().data) == 6
