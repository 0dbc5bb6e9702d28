"""`sagellm serve` as a process, from the line with its address to its exit code."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest
from gateway_served import SERVERS, ask, get, post

ASKED = {
    "model": "sage-tiny",
    "messages": [{"role": "user", "content": "What is 20 + 31?"}],
    "max_tokens": 8,
    "temperature": 0,
}


@contextmanager
def serve(*options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port, when the server is ready."""
    command = [sys.executable, "-m", "sagellm", "serve", *options, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            yield process, _port(process.stderr)
        finally:
            process.kill()


def _port(errors: IO[str]) -> int:
    """The port in the line with the URL, after the line that the server is ready."""
    port, is_ready = 0, False
    for line in errors:
        found = re.search(r" at http://127\.0\.0\.1:(\d+)$", line.strip())
        port = int(found[1]) if found else port
        is_ready = is_ready or '"is_ready": true' in line
        if port and is_ready:
            return port
    raise AssertionError("it never became ready")


@pytest.mark.parametrize("server", SERVERS)
def test_a_graph_answers_and_a_signal_ends_it(server: str) -> None:
    with serve("graphs/pd.yaml", "--server", server) as (process, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as ready:
            assert ready.status == 200
        reply = ask(port, post("/v1/chat/completions", ASKED))
        assert json.loads(reply.body)["choices"][0]["message"]["content"] == "51"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def test_a_model_is_served_under_the_names_that_it_was_given() -> None:
    names = ("--served-model-name", "a", "--served-model-name", "b", "--max-model-len", "64")
    with serve("sage-tiny", *names, "--api-key", "k") as (process, port):
        assert ask(port, get("/v1/models")).status == 401
        listed = ask(port, get("/v1/models", "Authorization: Bearer k"))
        cards = json.loads(listed.body)["data"]
        assert [(card["id"], card["max_model_len"]) for card in cards] == [("a", 64), ("b", 64)]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
