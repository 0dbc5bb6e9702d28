"""Content negotiation of /metrics: every scraper of the field gets names with colons."""

from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from sagellm import Sampling
from sagellm.gateway.metrics.exposition import OPEN_METRICS, TEXT, format_of

PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
)
OPEN_1, OPEN_0 = (f"application/openmetrics-text;version={one}" for one in ("1.0.0", "0.0.1"))
PLAIN_1, PLAIN_0 = "text/plain;version=1.0.0", "text/plain;version=0.0.4"
UTF_8 = "escaping=allow-utf-8"
SCRAPERS = {
    "Prometheus 2.0": f"{PLAIN_0};q=1,*/*;q=0.1",
    "Prometheus 2.5": f"{OPEN_0.replace(';', '; ')},{PLAIN_0};q=0.5,*/*;q=0.1",
    "Prometheus 2.42, Grafana Agent": f"{OPEN_1},{OPEN_0};q=0.75,{PLAIN_0};q=0.5,*/*;q=0.1",
    "Prometheus 2.53, OTel collector": f"{OPEN_1};q=0.5,{OPEN_0};q=0.4,{PLAIN_0};q=0.3,*/*;q=0.2",
    "Prometheus 2.53, native histograms": (
        f"{PROTOBUF};q=0.5,{OPEN_1};q=0.4,{OPEN_0};q=0.3,{PLAIN_0};q=0.2,*/*;q=0.1"
    ),
    "Prometheus 3, Alloy": (
        f"{OPEN_1};{UTF_8};q=0.5,{OPEN_0};q=0.4,{PLAIN_1};{UTF_8};q=0.3,{PLAIN_0};q=0.2,*/*;q=0.1"
    ),
    "Prometheus 3, legacy names": (
        f"{OPEN_1};escaping=underscores;q=0.5,{PLAIN_1};escaping=underscores;q=0.3,*/*;q=0.1"
    ),
    "Prometheus 3, native histograms": (
        f"{PROTOBUF};{UTF_8};q=0.6,{OPEN_1};{UTF_8};q=0.5,{PLAIN_0};q=0.2,*/*;q=0.1"
    ),
    "Datadog": "text/plain",
    "Datadog, latest specification": f"{OPEN_1},{OPEN_0}",
    "vmagent": f"{PLAIN_0};q=1,*/*;q=0.1",
    "Telegraf": f"{PROTOBUF};q=0.7,text/plain;version=0.0.4;q=0.3",
    "curl": "*/*",
    "a browser": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "none": "",
    "nonsense": ";;q=,=/;version=x,application/openmetrics",
}
ONLY_OPEN_METRICS = {"Datadog, latest specification"}


@pytest.mark.parametrize("scraper", SCRAPERS)
async def test_every_scraper_reads_vllms_names(opened: Any, scraper: str) -> None:
    async with opened("joint") as (session, meters):
        await session.generate([1], sampling=Sampling(max_tokens=2))
        body, content_type = await meters.exposition(SCRAPERS[scraper])
    is_open = scraper in ONLY_OPEN_METRICS
    families = (parse_open if is_open else parse)(body.decode())
    names = {sample.name for family in families for sample in family.samples}
    assert {"vllm:num_requests_running", "vllm:prompt_tokens_total"} <= names
    assert "vllm:time_to_first_token_seconds_bucket" in names
    assert not [name for name in names if name.startswith("vllm_")]
    assert "escaping" not in content_type
    assert content_type == (OPEN_METRICS if is_open else TEXT).content_type


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        ("application/openmetrics-text", OPEN_METRICS),
        ("Application/OpenMetrics-Text; version=1.0.0, text/plain; q=0", OPEN_METRICS),
        ("application/openmetrics-text, text/*;q=0.1", TEXT),
        ("application/openmetrics-text; q=0.0", TEXT),
        ("application/json", TEXT),
    ],
)
def test_openmetrics_goes_to_those_who_take_nothing_else(accept: str, found: Any) -> None:
    assert format_of(accept) == found
