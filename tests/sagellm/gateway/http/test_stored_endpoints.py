"""Files and batches over HTTP: each tenant's own, within the limits of uploads, on both servers."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_calls import as_file, begin, client_of, completion_line, ended, results, wait
from gateway_process import read_metrics
from gateway_served import SERVERS, ask, get, null_gateway, post
from starlette.types import Message
from stored_batches import stores_in

from sagellm.gateway.http.stored_endpoints import FileContent
from sagellm.gateway.settings import Budget, RequestLimits, StorageLimits

KEYS = {"alice": "alice-key", "bob": "bob-key"}
BEARER = "Authorization: Bearer alice-key"
FORM = "Content-Type: multipart/form-data; boundary=xyz"


@contextmanager
def served(folder: Path, server: str = "hypercorn", **fields: Any) -> Iterator[int]:
    known: dict[str, Any] = {"api_keys": KEYS, "data_dir": folder, **fields}
    with null_gateway(server, **known) as port:
        yield port


def client(port: int, key: str = "alice-key") -> openai.OpenAI:
    return client_of(f"http://127.0.0.1:{port}", key)


def body_of(content: bytes) -> bytes:
    """An upload as curl sends it."""
    head = b'Content-Disposition: form-data; name="'
    return b"".join(
        (
            b"--xyz\r\n" + head + b'purpose"\r\n\r\nbatch\r\n',
            b"--xyz\r\n" + head + b'file"; filename="in.jsonl"\r\n\r\n' + content,
            b"\r\n--xyz--\r\n",
        )
    )


@pytest.mark.parametrize("server", SERVERS)
def test_a_batch_from_upload_to_results(server: str, tmp_path: Path) -> None:
    with served(tmp_path, server) as port, client(port) as alice:
        lines = [completion_line(number) for number in range(20)]
        lines.append(completion_line(99, temperature=-1))
        batch = ended(alice, begin(alice, lines, metadata={"a": "b"}).id)
        assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (21, 20, 1)
        assert batch.usage is not None
        assert (batch.usage.input_tokens, batch.usage.output_tokens) == (40, 80)
        answers = results(alice, batch.output_file_id)
        assert len({line["custom_id"] for line in answers}) == 20
        assert all(line["response"]["body"]["usage"]["total_tokens"] == 6 for line in answers)
        [error] = results(alice, batch.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("c-99", 400)
        assert error["response"]["body"]["error"]["param"] == "temperature"


def test_a_line_has_the_answer_that_a_call_has(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice:
        line = completion_line(0, n=2, seed=7)
        batch = ended(alice, begin(alice, [line]).id)
        [found] = results(alice, batch.output_file_id)
        called = json.loads(ask(port, post("/v1/completions", line["body"], BEARER)).body)
    for answer in (called, found["response"]["body"]):
        answer.pop("id")
        answer.pop("created")
        answer["usage"].pop("prompt_tokens_details")
    assert found["response"]["body"] == called


def test_no_tenant_reaches_what_another_stored(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice, client(port, "bob-key") as bob:
        batch = ended(alice, begin(alice, [completion_line(0)]).id)
        assert batch.output_file_id is not None
        for file_id in (batch.input_file_id, batch.output_file_id):
            for act in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    act(file_id)
        for act_on_batch in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                act_on_batch(batch.id)
        with pytest.raises(openai.NotFoundError):
            bob.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/completions",
                completion_window="24h",
            )
        assert bob.files.list().data == bob.batches.list().data == []
        assert len(alice.files.list().data) == 2


def test_lists_come_in_pages(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice:
        batches = [begin(alice, [completion_line(0)]) for _ in range(3)]
        for each in batches:
            ended(alice, each.id)
        ids = [each.id for each in batches]
        assert [each.id for each in alice.batches.list(limit=2)] == ids[::-1]  # it turns the pages
        first = alice.batches.list(limit=2)
        assert (first.has_more, [each.id for each in first.data]) == (True, ids[:0:-1])
        inputs = [each.input_file_id for each in batches]
        found = alice.files.list(order="asc", purpose="batch", limit=2)
        assert [each.id for each in found.data] == inputs[:2]
        assert [each.id for each in found] == inputs
        assert len(list(alice.files.list(purpose="batch_output"))) == 3


@pytest.mark.parametrize("server", SERVERS)
def test_an_upload_may_be_larger_and_slower_than_other_bodies(server: str, tmp_path: Path) -> None:
    small = RequestLimits(body_bytes=1000, all_bodies_bytes=1000)
    storage = StorageLimits(upload_bytes=4 << 20)
    with served(tmp_path, server, limits=small, storage=storage) as port:
        raw = post("/v1/files", body_of(b"x" * (4 << 20)), BEARER, FORM)
        stored = ask(port, raw)
        assert (stored.status, json.loads(stored.body)["bytes"]) == (200, 4 << 20)
        file_id = json.loads(stored.body)["id"]
        content = ask(port, get(f"/v1/files/{file_id}/content", BEARER))
        assert (content.body == b"x" * (4 << 20), content.is_whole) == (True, True)
        for size in ((4 << 20) + 1, 5 << 20):
            refused = ask(port, post("/v1/files", body_of(b"x" * size), BEARER, FORM))
            assert refused.status == 413
        assert ask(port, post("/v1/completions", b"x" * 1001, BEARER)).status == 413
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_an_upload_of_unknown_length_is_stored(tmp_path: Path) -> None:
    body = body_of(b"content")
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n{BEARER}\r\n{FORM}\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with served(tmp_path) as port:
        reply = ask(port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
    assert json.loads(reply.body)["bytes"] == len(b"content")


def test_the_length_of_an_upload_may_have_many_zeros(tmp_path: Path) -> None:
    body = body_of(b"content")
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n{BEARER}\r\n{FORM}\r\n"
    zeros = "0" * 5000  # more than Python converts
    with served(tmp_path, "uvicorn") as port:
        reply = ask(port, f"{head}Content-Length: {zeros}{len(body)}\r\n\r\n".encode() + body)
    assert reply.status == 200


async def test_a_file_that_lost_its_bytes_is_a_whole_answer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    content, sent = FileContent((tmp_path / "file").open("rb"), stores_in(tmp_path).folder), []

    async def send(message: Message) -> None:
        sent.append(message)

    await content({"method": "GET"}, receive=send, send=send)  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert not sent[-1].get("more_body", False)


def test_a_client_that_leaves_leaves_nothing_of_its_upload(tmp_path: Path) -> None:
    raw = post("/v1/files", body_of(b"x" * 1000), BEARER, FORM)
    with served(tmp_path) as port, client(port) as alice:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(raw[:-20])
        wait(lambda: list(tmp_path.rglob("*.part")), lambda parts: not parts)
        assert alice.files.list().data == []
    assert [path.name for path in tmp_path.rglob("*.part")] == []


@pytest.mark.parametrize("path", ["/x", "/%2e%2e", "/%00", "/..%2f..%2fx", "/" + "x" * 200])
def test_strange_ids_are_not_found(tmp_path: Path, path: str) -> None:
    with served(tmp_path) as port:
        for kind in ("files", "batches"):
            assert ask(port, get(f"/v1/{kind}{path}", BEARER)).status == 404


def test_without_a_folder_the_endpoints_say_how_to_open_them() -> None:
    with null_gateway("hypercorn") as port:
        for raw in (
            get("/v1/files"),
            get("/v1/batches/batch_1"),
            post("/v1/files", body_of(b"x"), FORM),
            post("/v1/batches", {"input_file_id": "x"}),
        ):
            reply = ask(port, raw)
            assert (reply.status, reply.error["code"]) == (404, "storage_off")
            assert "--data-dir" in reply.error["message"]


def test_a_batch_takes_nothing_of_its_keys_budget(tmp_path: Path) -> None:
    """One open request is the key's budget, and many lines run at once."""
    budgets = {"alice": Budget(num_open=1, num_waiting=1)}
    with served(tmp_path, budgets=budgets) as port, client(port) as alice:
        began = begin(alice, [completion_line(number, max_tokens=64) for number in range(200)])
        while alice.batches.retrieve(began.id).status != "completed":
            alice.completions.create(model="m", prompt=[1, 2], max_tokens=2)
        batch = alice.batches.retrieve(began.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 200


def test_metrics_count_batches_and_their_requests(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice:
        lines = [completion_line(0), completion_line(1, temperature=-1)]
        ended(alice, begin(alice, lines).id)
        found = wait(
            lambda: read_metrics(ask(port, get("/metrics", BEARER)).body.decode()),
            lambda read: 'sagellm_batches_total{status="completed"}' in read,
        )
    assert found['sagellm_batches_total{status="completed"}'] == 1
    assert found['sagellm_batch_requests_total{outcome="answered"}'] == 1
    assert found['sagellm_batch_requests_total{outcome="failed"}'] == 1


def test_a_wrong_file_fails_the_batch_with_its_lines(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice:
        content = as_file([completion_line(0)]) + b"{\n\xff\x00\n"
        file = alice.files.create(file=("in.jsonl", content), purpose="batch")
        batch = alice.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = ended(alice, batch.id)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
    ]


def test_a_file_of_results_is_no_input(tmp_path: Path) -> None:
    with served(tmp_path) as port, client(port) as alice:
        batch = ended(alice, begin(alice, [completion_line(0)]).id)
        with pytest.raises(openai.BadRequestError, match="file of results"):
            alice.batches.create(
                input_file_id=str(batch.output_file_id),
                endpoint="/v1/completions",
                completion_window="24h",
            )
