"""Wrong requests that bypass the session's checks end as refused; the graph lives on."""

from typing import Any

import msgspec
import pytest
from endings import outputs
from trio.testing import MockClock

from sagellm import Graph, Sampling, TokenEvent
from sagellm.runtime.messages import Request
from sagellm.session import Session

NULL = {"device": "null", "max_model_len": 256, "num_blocks": 64}
LONG = (1,) * 40  # pd computes these on two engines
WRONG: list[dict[str, Any]] = [
    {"prompt_token_ids": (*LONG, -1)},
    {"prompt_token_ids": (*LONG, 1 << 63)},
    {"prompt_token_ids": (*LONG, 10**6)},
    {"prompt_token_ids": (1,) * 256},
    {"prompt_token_ids": ()},
    {"sampling": Sampling(stop_token_ids=(1 << 63,), min_tokens=1)},
    {"sampling": Sampling(min_tokens=10**9)},
    {"sampling": Sampling(max_tokens=0)},
    {"sampling": Sampling(max_tokens=10**12)},
    {"sampling": Sampling(temperature=float("nan"))},
]


async def injected(session: Session, request: Request) -> list[TokenEvent]:
    """The end of a request that enters the graph unchecked."""
    stream = session.stream([1], request_id=request.request_id)
    stream.requests = [request]
    return [event async for event in outputs(stream) if isinstance(event, TokenEvent)]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:60])
@pytest.mark.parametrize("name", ["joint", "pd"])
async def test_a_wrong_request_is_refused_and_the_next_is_served(
    name: str, wrong: dict[str, Any], autojump_clock: MockClock
) -> None:
    graph = Graph.load(name)
    null = {f"{engine}.{key}": NULL[key] for engine in graph.ir.engines for key in NULL}
    right = Request(request_id="r", prompt_token_ids=LONG, sampling=Sampling(max_tokens=3))
    async with graph.open(set=null) as session:
        (event,) = await injected(session, msgspec.structs.replace(right, **wrong))
        assert (event.finish_reason, event.code) == ("refused", "bad_request")
        assert event.error
        events = await injected(session, right)
        assert events[-1].finish_reason == "length"
        await session.idle()
        session.executor.core.ledger.check()
        pools = session.statistics().engines.values()
        assert all(load.num_leased_blocks == 0 for pool in pools for load in pool)
