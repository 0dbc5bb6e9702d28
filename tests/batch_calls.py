"""Batches of a served gateway, by openai-python from a plain thread."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch

ENDED = ("completed", "failed", "expired", "cancelled")
CHATS = "/v1/chat/completions"


def chat_line(number: int, **body: Any) -> dict[str, Any]:
    """A line of a batch file: a sum that sage-tiny knows, greedy."""
    asked = [{"role": "user", "content": f"What is {number} + 45?"}]
    fields = {"messages": asked, "temperature": 0, "max_tokens": 8, **body}
    return {"custom_id": f"sum-{number}", "method": "POST", "url": CHATS, "body": fields}


def completion_line(number: int, **body: Any) -> dict[str, Any]:
    """A line of a batch file for a null engine."""
    fields = {"prompt": [1, 2], "max_tokens": 4, "ignore_eos": True, **body}
    return {"custom_id": f"c-{number}", "method": "POST", "url": "/v1/completions", "body": fields}


def as_file(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def client_of(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def begin(client: openai.OpenAI, lines: Iterable[Mapping[str, Any]], **fields: Any) -> Batch:
    """Upload lines, and create their batch."""
    found = list(lines)
    file = client.files.create(file=("in.jsonl", as_file(found)), purpose="batch")
    known: dict[str, Any] = {"endpoint": found[0]["url"], "completion_window": "24h", **fields}
    return client.batches.create(input_file_id=file.id, **known)


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    """The batch, once it has ended."""
    return wait(lambda: client.batches.retrieve(batch_id), lambda batch: batch.status in ENDED)


def wait(look: Callable[[], Any], is_right: Callable[[Any], bool], within_s: float = 60.0) -> Any:
    """What `look` returns, once it is right: another process wakes nobody here."""
    until_s = time.monotonic() + within_s
    while not is_right(found := look()):
        assert time.monotonic() < until_s, found
        time.sleep(0.01)
    return found


def results(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def contents(lines: Iterable[Any]) -> dict[str, str]:
    """The text of each answer to a chat, by custom id."""
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }


def num_stored(folder: Path, pattern: str = "*/open/*.output") -> int:
    """How many whole lines of results lie on the disk."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(pattern))
