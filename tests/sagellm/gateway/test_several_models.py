"""Two models behind one gateway, and behind gateways and workers in processes of their own."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from gateway_served import Reply, get, post, read_reply
from gateway_session import ServedSession, served_session

GRAPH = "examples/two_models.yaml"
QUICK = {"tiny.device": "null", "tiny.max_model_len": 1024}
WORKERS = {"executor": "processes"}
COMPLETIONS = "/v1/completions"


@asynccontextmanager
async def two(**fields: Any) -> AsyncIterator[ServedSession]:
    async with served_session("hypercorn", GRAPH, QUICK, **fields) as served:
        yield served


async def ask(served: ServedSession, raw: bytes) -> Reply:
    async with await served.connect() as stream:
        await stream.send_all(raw)
        return await read_reply(stream)


async def content(served: ServedSession, raw: bytes) -> Any:
    return json.loads((await ask(served, raw)).body)


@pytest.mark.parametrize("num_gateways", [0, 1])
async def test_each_model_has_its_names_limits_and_tokenizer(num_gateways: int) -> None:
    async with two(num_gateways=num_gateways) as served:
        listed = (await content(served, get("/v1/models")))["data"]
        echo = await content(served, get("/v1/models/echo"))
        tokens = {
            model: await content(served, post("/tokenize", {"model": model, "messages": CHAT}))
            for model in ("default", "echo")
        }
        facts = await content(served, get("/tokenizer_info?model=echo"))
        default = await content(served, get("/tokenizer_info"))
    assert [(one["id"], one["max_model_len"]) for one in listed] == [
        ("sage-tiny", 1024),
        ("default", 1024),
        ("echo", 256),
    ]
    assert echo == listed[2]
    assert tokens["default"]["tokens"] != tokens["echo"]["tokens"]
    assert max(tokens["default"]["tokens"]) >= 256 > max(tokens["echo"]["tokens"])
    assert (facts["chat_template"], facts["vocab_size"]) == (None, 256)
    assert default["vocab_size"] == 264


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("num_gateways", "opened"), [(0, {}), (1, WORKERS)], ids=["one process", "processes"]
)
async def test_a_request_chooses_and_metrics_say_which(
    num_gateways: int, opened: dict[str, str]
) -> None:
    async with two(num_gateways=num_gateways, opened=opened) as served:
        body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True}
        answers = [
            await content(served, post(COMPLETIONS, {**body, **named}))
            for named in ({"model": "echo"}, {"model": "default"}, {})
        ]
        streamed = await ask(served, post(COMPLETIONS, {**body, "model": "echo", "stream": True}))
        too_long = await content(
            served, post(COMPLETIONS, {**body, "model": "echo", "max_tokens": 400})
        )
        unknown = await ask(served, post(COMPLETIONS, {**body, "model": "ehco"}))
        metrics = (await ask(served, get("/metrics"))).body.decode()
    assert [answer["model"] for answer in answers] == ["echo", "sage-tiny", "sage-tiny"]
    assert b'"model":"echo"' in streamed.body
    assert "maximum context length is 256 tokens" in too_long["error"]["message"]
    assert unknown.status == 404
    assert "did you mean echo?" in json.loads(unknown.body)["error"]["message"]
    for model in ("echo", "sage-tiny"):
        labels = f'{{engine="0",model_name="{model}"}}'
        assert f"vllm:generation_tokens_total{labels} 6.0\n" in metrics
        assert f"vllm:num_requests_running{labels} 0.0\n" in metrics
    assert 'model_name="unknown"' not in metrics
    pools = re.findall(r'cache_config_info{.*model_name="(.*?)".*pool="(.*?)"', metrics)
    assert sorted(pools) == [("echo", "bytes/0"), ("sage-tiny", "tiny/0")]
