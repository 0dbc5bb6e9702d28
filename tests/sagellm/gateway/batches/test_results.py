"""Result files: each result once, whole lines only, whatever cut the last one off."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from stored_batches import TENANT, claimed, full_disk, new_batch, stores_in

from sagellm.gateway.batches import file_store
from sagellm.gateway.batches.batch_record import BatchTokens
from sagellm.gateway.batches.batch_store import BatchClaim
from sagellm.gateway.batches.results import (
    LineResponse,
    ResultFiles,
    ResultLine,
    Tally,
    publish,
    published,
    unanswered,
)


def line(name: str, status: int = 200, body: Any = None) -> ResultLine:
    raw = msgspec.Raw(json.dumps(body or {}).encode())
    return ResultLine(id="batch_req_1", custom_id=name, response=LineResponse(status, "r", raw))


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[BatchClaim]:
    stores = stores_in(tmp_path)
    new_batch(stores, 4)
    with claimed(stores) as found:
        yield found


def append(claim: BatchClaim, *lines: ResultLine) -> None:
    with closing(ResultFiles(claim)) as results:
        results.open()
        results.append(lines)


def read(claim: BatchClaim) -> Tally:
    with closing(ResultFiles(claim)) as results:
        return results.open()


def test_a_line_has_the_form_of_the_api() -> None:
    assert json.loads(line("a", 200, {"x": "\u2028"}).encoded) == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r", "body": {"x": "\u2028"}},
        "error": None,
    }
    [failed] = unanswered("batch_expired", "too late", ["b"])
    assert json.loads(failed.encoded)["error"] == {"code": "batch_expired", "message": "too late"}
    assert json.loads(failed.encoded)["response"] is None


def test_no_line_end_of_unicode_divides_a_line() -> None:
    body = msgspec.Raw('{"x": "a\u2028b\u0085c"}'.encode())
    one = ResultLine(id="i", custom_id="\u2029", response=LineResponse(200, "r", body))
    assert len(one.encoded.decode().splitlines()) == 1


def test_what_was_appended_is_read_again(claim: BatchClaim) -> None:
    append(claim, line("a"), line("b", 400), line("c"))
    append(claim, line("d", 500))
    tally = read(claim)
    assert (tally.completed, tally.failed) == (2, 2)
    assert tally.done == {"a", "b", "c", "d"}


@pytest.mark.parametrize("torn", [b"{", b'{"custom_id": "z"}', b"\x00" * 9 + b"\n", b"\xff\n{}\n"])
def test_a_torn_end_is_cut_off(claim: BatchClaim, torn: bytes) -> None:
    append(claim, line("a"), line("b"))
    with claim.path("output").open("ab") as file:
        file.write(torn)
    assert read(claim).done == {"a", "b"}
    append(claim, line("c"))
    assert read(claim).done == {"a", "b", "c"}


def test_a_full_disk_leaves_no_half_line(
    claim: BatchClaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(claim, line("a"))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", full_disk)
        with pytest.raises(OSError, match="full"):
            append(claim, line("b"))
    assert read(claim).done == {"a"}
    append(claim, line("b"))
    assert read(claim).completed == 2


def test_tokens_of_every_api_are_added(claim: BatchClaim) -> None:
    chat = {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    response = {
        "input_tokens": 7,
        "output_tokens": 4,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    append(claim, line("a", body={"usage": chat}), line("b", body={"usage": response}))
    append(claim, line("c", body={"usage": None}), line("d", 400, {"error": {"code": None}}))
    assert read(claim).tokens == BatchTokens(input=12, cached=8, output=7, reasoning=3)


@pytest.mark.parametrize("body", [[], "x", None, {"usage": 1}, {"usage": {"prompt_tokens": "x"}}])
def test_an_answer_of_any_form_is_a_result(claim: BatchClaim, body: Any) -> None:
    append(claim, line("a", body=body), line("b"))
    assert (read(claim).completed, read(claim).tokens) == (2, BatchTokens())


def test_results_are_published_once_however_often_that_begins(claim: BatchClaim) -> None:
    append(claim, line("a"))
    for _ in range(2):
        publish(claim)
    files = claim.own.files
    record = claim.record
    assert (files / f"{record.output_id}.data").read_bytes().count(b"\n") == 1
    assert (files / f"{record.output_id}.json").exists()
    assert not (files / f"{record.error_id}.json").exists()  # no request failed
    assert record.tenant == TENANT


def test_a_sweep_keeps_results_that_a_full_disk_leaves_without_a_record(
    tmp_path: Path, claim: BatchClaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(claim, line("a"))
    os.utime(claim.path("output"), (0, 0))
    with monkeypatch.context() as patched:
        patched.setattr(file_store, "write_atomically", full_disk)
        with pytest.raises(OSError, match="full"):
            publish(claim)
    stores_in(tmp_path).files.sweep()
    publish(claim)
    assert published(claim) == (True, False)
