"""The wall clock jumps by an hour, forth and back: no time limit notices."""

import time

import pytest
import trio
from gateway_process import read_metrics
from gateway_served import SERVERS, get, post, read_reply
from gateway_session import ServedSession, served_session

COSTS = {"g.device": "null", "g.decode_step_s": 0.005, "g.prefill_token_s": 0.0}
STREAM = {"prompt": [1], "max_tokens": 60, "stream": True, "ignore_eos": True, "timeout_s": 30.0}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
async def test_nothing_expires(server: str, jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    async with served_session(server, "joint", COSTS) as served, await served.connect() as stream:
        await stream.send_all(post("/v1/completions", STREAM, "Connection: close"))
        assert b"200" in await stream.receive_some()
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        body = b"".join([part async for part in stream])
        assert b"data: [DONE]" in body
        assert body.count(b'"finish_reason":"length"') == 1
        await asked(served, "/ready")
        metrics = read_metrics(await asked(served, "/metrics"))
    assert served.session.executor.core.ledger.ended["length"] >= 1
    assert served.session.executor.core.ledger.ended["expired"] == 0
    sums = {name: value for name, value in metrics.items() if "_sum" in name}
    assert len(sums) > 5
    assert all(0 <= value < 600 for name, value in sums.items() if "seconds" in name)


async def asked(served: ServedSession, path: str) -> str:
    async with await served.connect() as stream:
        await stream.send_all(get(path))
        with trio.fail_after(20):
            reply = await read_reply(stream)
    assert reply.status == 200
    return reply.body.decode()
