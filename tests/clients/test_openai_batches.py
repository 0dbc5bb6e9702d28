"""openai-python's files and batches, against a real server with a data folder."""

import json
import time

import pytest

openai = pytest.importorskip("openai")

KEY = "sk-of-the-tests"

WITHIN_S = 60.0


@pytest.fixture(scope="module", params=["hypercorn", "uvicorn"])
def batch_url(request, serve, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    log = tmp_path_factory.mktemp("server") / f"{request.param}.log"
    with serve(log, "--server", request.param, "--data-dir", str(folder)) as url:
        yield url


@pytest.fixture
def client(batch_url):
    with openai.OpenAI(base_url=f"{batch_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def lines(num, **fields):
    return [
        {
            "custom_id": f"sum-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": f"What is {number} + 45?"}],
                "temperature": 0,
                "max_tokens": 8,
                **fields,
            },
        }
        for number in range(num)
    ]


def upload(client, asked, **fields):
    content = "\n".join(json.dumps(line) for line in asked).encode()
    return client.files.create(file=("sums.jsonl", content), purpose="batch", **fields)


def create(client, asked):
    return client.batches.create(
        input_file_id=upload(client, asked).id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )


def ended(client, batch):
    until = time.monotonic() + WITHIN_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def test_a_file_comes_back_as_it_was(client):
    file = upload(client, lines(2), expires_after={"anchor": "created_at", "seconds": 7200})
    assert (file.object, file.filename, file.purpose) == ("file", "sums.jsonl", "batch")
    assert file.expires_at == file.created_at + 7200
    assert client.files.retrieve(file.id) == file
    assert len(client.files.content(file.id).read()) == file.bytes
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted) == (file.id, True)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_batch_is_answered(client):
    asked = [*lines(5), {**lines(1)[0], "custom_id": "wrong", "body": {"messages": []}}]
    batch = ended(client, create(client, asked))
    assert batch.status == "completed"
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at < batch.expires_at
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 5, 1)
    answers = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    texts = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in answers
    }
    assert texts == {f"sum-{number}": f"{number + 45}" for number in range(5)}
    [error] = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(error)["response"]["status_code"] == 400


def test_a_batch_is_cancelled(client):
    batch = create(client, lines(500, max_tokens=500, ignore_eos=True))
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert ended(client, batch).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_a_wrong_file_fails_with_its_lines(client):
    batch = ended(client, create(client, [*lines(1), *lines(1, stream=True)]))
    assert batch.status == "failed"
    [error] = batch.errors.data
    assert (error.line, error.param) == (2, "body.stream")


def test_what_is_not_served_is_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("a", b"x"), purpose="fine-tune")
    assert error.value.param == "purpose"
    file = upload(client, lines(1))
    with pytest.raises(openai.BadRequestError) as error:
        client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
    assert error.value.param == "endpoint"


def test_pages_are_turned(client):
    ids = [upload(client, lines(1)).id for _ in range(3)]
    found = [each.id for each in client.files.list(limit=1, order="desc")]
    assert found[:3] == ids[::-1]
