"""A real Prometheus that scrapes: every query of the dashboards has data, promtool accepts all."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

KEY = "sk-of-the-tests"
BOARD = Path(__file__).parents[2] / "examples/observability/grafana/sagellm.json"
WAIT_S = 40.0
MODEL = 'model_name=~".*"'
_TIMES = [
    "e2e_request_latency",
    "time_to_first_token",
    "inter_token_latency",
    "request_time_per_output_token",
    "request_queue_time",
    "request_prefill_time",
    "request_decode_time",
    "request_inference_time",
]
_LENGTHS = [
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
    "request_num_preemptions",
    "iteration_tokens_total",
    "request_prefill_kv_computed_tokens",
]
_TOTALS = [
    "prompt_tokens",
    "generation_tokens",
    "prompt_tokens_cached",
    "request_success",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "external_prefix_cache_queries",
    "external_prefix_cache_hits",
    "prompt_tokens_by_source",
    "prompt_tokens_cached_by_source",
]
_GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]


def vllm_queries():
    """Queries of dashboards for vLLM: quantiles and means of times and lengths, rates, gauges."""
    for family in (*(f"{name}_seconds" for name in _TIMES), *_LENGTHS):
        name = f"vllm:{family}"
        for quantile in (0.5, 0.99):
            rates = f"sum by (le) (rate({name}_bucket{{{MODEL}}}[1m]))"
            yield f"histogram_quantile({quantile}, {rates})"
        yield f"sum(rate({name}_sum{{{MODEL}}}[1m])) / sum(rate({name}_count{{{MODEL}}}[1m]))"
    for name in _TOTALS:
        yield f"sum(rate(vllm:{name}_total{{{MODEL}}}[1m]))"
    for name in _GAUGES:
        yield f"vllm:{name}{{{MODEL}}}"
    yield "vllm:cache_config_info"
    yield 'sum by (status) (rate(http_requests_total{handler="/v1/completions"}[1m]))'
    yield "sum by (handler) (rate(http_request_duration_seconds_count[1m]))"
    rates = "sum by (le) (rate(http_request_duration_highr_seconds_bucket[1m]))"
    yield f"histogram_quantile(0.9, {rates})"


def own_queries():
    """The queries of our dashboard, with Grafana's variables filled in."""
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "1m")
            yield re.sub(r"\$\w+", ".*", text)


# An idle server rejects nothing: this family has no series yet.
NOTHING_YET = "sagellm_admission_rejections_total"


def get(address, **query):
    with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.load(answer)["data"]


def complete(url):
    body = json.dumps({"prompt": "def add(a, b):", "max_tokens": 8, "ignore_eos": True}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/completions", body, headers)
    urllib.request.urlopen(asked, timeout=30).read()


def has_data(address, query):
    return bool(get(f"{address}/api/v1/query", query=query)["result"])


def tool(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: apt-get install prometheus")
    return found


@pytest.fixture
def prometheus(url, tmp_path):
    """The address of a Prometheus that scrapes the server five times a second."""
    command = tool("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = url.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms}\nscrape_configs:\n- job_name: sagellm\n"
        f"  authorization: {{credentials: {KEY}}}\n"
        f"  static_configs: [{{targets: ['{target}']}}]\n"
    )
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, *options, f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log, env={**os.environ, "no_proxy": "*"},
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


def test_every_query_of_the_boards_has_data(url, prometheus):
    """Queries are repeated until all have data: a rate needs two scrapes."""
    missing = [*vllm_queries(), *own_queries()]
    assert len(missing) > 100
    until = time.monotonic() + WAIT_S
    while missing and time.monotonic() < until:
        complete(url)
        time.sleep(0.2)
        try:
            missing = [query for query in missing if not has_data(prometheus, query)]
        except OSError:  # Prometheus still starts
            continue
        missing = [query for query in missing if NOTHING_YET not in query]
    assert not missing
    assert not has_data(prometheus, '{__name__=~"vllm_.*"}')


def test_promtool_finds_nothing_but_names_that_vllm_chose(url):
    command = tool("promtool")
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"{url}/metrics", headers=headers)
    text = urllib.request.urlopen(asked, timeout=10).read()
    done = subprocess.run([command, "check", "metrics"], input=text, capture_output=True)
    said = (done.stdout + done.stderr).decode().splitlines()
    assert not [line for line in said if not line.startswith("vllm:")]
