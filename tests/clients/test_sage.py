"""The published package `isage`: pipelines over a graph, its gateway command, its edge server.

Runs where sagellm is importable beside it: `make clients` adds the project to the environment.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

pytest.importorskip("sage.runtime")
pytest.importorskip("sagellm")

from sage.foundation import BatchFunction, SinkFunction
from sage.runtime import LocalEnvironment

from sagellm import Graph, ops
from sagellm.sage import (
    GenerateAnswers,
    SubmitRequests,
    TokenEvents,
    close_graphs,
    register_graph,
)

REQUESTS, TOKENS = 20, 5


class Prompts(BatchFunction):
    def __init__(self, count):
        super().__init__()
        self.left = count

    def execute(self):
        if not self.left:
            return None
        self.left -= 1
        return {"id": f"p{self.left}", "prompt": f"prompt {self.left}"}


class Gathered(SinkFunction):
    seen = []  # noqa: RUF012 - shared: SAGE makes the instance

    def execute(self, data):
        self.seen.append(data)


@pytest.fixture
def graph():
    Gathered.seen = []
    engine = {"kind": "modelled", "model": "sage-tiny", "decode_step_s": 0.002}
    chain = Graph("g").engine("e", prefill_token_s=0.0, **engine)
    named = register_graph("llm", chain >> ops.policy_sort() >> ops.generate(engine="e"))
    assert named.session.health().num_open == 0  # it is open before the time is taken
    yield "llm"
    close_graphs()


def until(condition, timeout_s=20.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_tokens_stream_through_a_pipeline(graph):
    """All requests run at once: 20 of 5 tokens take some ten steps of 2 ms, not 100."""
    environment = LocalEnvironment("stream")
    environment.from_batch(Prompts, REQUESTS).sink(
        SubmitRequests, graph, max_tokens=TOKENS, ignore_eos=True
    )
    environment.from_source(TokenEvents, graph, num_requests=REQUESTS).sink(Gathered)
    begun_s = time.perf_counter()
    environment.submit(autostop=True)
    until(lambda: sum(event.is_last for event in Gathered.seen) == REQUESTS)
    took_s = time.perf_counter() - begun_s
    assert sum(event.num_tokens for event in Gathered.seen) == REQUESTS * TOKENS
    assert took_s <= 0.1


def test_whole_answers_go_through_a_map(graph):
    environment = LocalEnvironment("whole")
    environment.from_batch(Prompts, 3).map(
        GenerateAnswers, graph, max_tokens=TOKENS, ignore_eos=True
    ).sink(Gathered)
    environment.submit(autostop=True)
    until(lambda: len(Gathered.seen) == 3)
    assert [answer.num_tokens for answer in Gathered.seen] == [TOKENS] * 3


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def process(command, environment, url):
    with subprocess.Popen(command, env=environment) as started:
        try:
            until(lambda: answers(url), 60)
            yield
        finally:
            started.terminate()
            started.wait(30)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def chat(url):
    body = {
        "model": "sage-tiny",
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "What is 23 + 45?"}],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_sage_starts_our_gateway_by_its_own_command():
    from sage.serving import gateway

    config = gateway.SageServeConfig(
        port=free_port(), model="sage-tiny", gateway_module="sagellm.sage"
    )
    command = gateway.build_sagellm_gateway_command(config)
    with process(command, gateway.build_sagellm_gateway_env(config), config.health_url):
        assert gateway.probe_gateway(config).ok
        assert chat(f"http://127.0.0.1:{config.port}") == "68"


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_the_edge_server_mounts_our_gateway(prefix):
    pytest.importorskip("fastapi")
    port = free_port()
    environment = {
        **os.environ,
        "SAGE_EDGE_GATEWAY_APP": "sagellm.sage.edge_app:app",
        "SAGE_EDGE_LLM_PREFIX": prefix,
    }
    command = [sys.executable, "-m", "sage.edge.server", "--host", "127.0.0.1"]
    url = f"http://127.0.0.1:{port}"
    with process([*command, "--port", str(port)], environment, f"{url}/healthz"):
        assert chat(url + prefix) == "68"
