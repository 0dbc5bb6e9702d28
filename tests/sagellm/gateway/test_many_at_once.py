"""A thousand requests at once, as benchmarks and `asyncio.gather` send them: all are answered."""

import json

import pytest
import trio
from gateway_served import post, read_reply
from gateway_session import served_session

from sagellm.gateway.settings import RequestLimits, raise_open_files

NUM = 1000
FAST = {"g.device": "null", "g.decode_step_s": 0.0, "g.prefill_token_s": 0.0}
CHAT = {"messages": [{"role": "user", "content": "hey"}], "max_tokens": 2, "stream": True}
KEYED = {"api_keys": {"a": "k"}}
ALL = {"budget": None}  # as it is set up without keys


@pytest.fixture(autouse=True)
def _files() -> None:
    raise_open_files()


@pytest.mark.parametrize(("server", "keys"), [("hypercorn", {}), ("uvicorn", KEYED)])
async def test_a_thousand_chats_at_once_are_answered(server: str, keys: dict[str, object]) -> None:
    """With one key, too: its budget is wide enough."""
    asked = post("/v1/chat/completions", CHAT, "Connection: close", "Authorization: Bearer k")
    statuses: list[int] = []
    async with served_session(server, "joint", FAST, **ALL, **keys) as served:

        async def ask() -> None:
            async with await served.connect() as stream:
                await stream.send_all(asked)
                reply = await read_reply(stream)
                assert reply.body.endswith(b"data: [DONE]\n\n"), reply.body[:200]
                statuses.append(reply.status)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(NUM):
                    nursery.start_soon(ask)
    assert statuses == [200] * NUM


async def test_a_thousand_prompts_of_one_call_are_answered() -> None:
    asked = {"prompt": ["hey"] * NUM, "max_tokens": 1}
    async with (
        served_session("hypercorn", "joint", FAST, **ALL) as served,
        await served.connect() as stream,
    ):
        await stream.send_all(post("/v1/completions", asked))
        with trio.fail_after(60):
            reply = await read_reply(stream)
    assert reply.status == 200
    assert len(json.loads(reply.body)["choices"]) == NUM <= RequestLimits().num_prompts
