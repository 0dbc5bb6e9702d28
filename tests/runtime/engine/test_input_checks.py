"""Checks that an engine makes itself, for any caller and any way of submitting."""

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from engine_driver import Driver, running

from sagellm.runtime.engine.kinds.modelled import ModelledOptions, open_modelled
from sagellm.runtime.messages import LeaseRef, SequenceState
from sagellm.runtime.port import EngineRefusal, LeaseOffer, StaleLease
from sagellm.runtime.sampling import Sampling

PROMPT = (1, 2, 3, 4)
VOCAB = 32000
BAD_IDS = [-1, VOCAB, 1 << 63, -(1 << 63), 1.5, True, "1", None]
BAD_SAMPLING: list[dict[str, Any]] = [
    {"stop_token_ids": (-1,)},
    {"stop_token_ids": (VOCAB,)},
    {"stop_token_ids": (1 << 63,), "min_tokens": 1},
    {"logit_bias": {1 << 63: 1.0}},
    {"min_tokens": 9, "max_tokens": 8},
    {"min_tokens": 10**9},
    {"min_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 10**12},
    {"logprobs": 21},
    {"prompt_logprobs": 21},
    {"prompt_logprobs": -1},
    {"temperature": float("nan")},
    {"seed": 2**70},
    {"stop": ("",)},
]


@dataclass
class Way:
    """One way of submitting: alone, with blocks held at the end, or after adopted blocks."""

    driver: Driver
    name: str
    lease: LeaseRef | None = None

    async def submit(self, **changes: Any) -> None:
        known = {"prompt_token_ids": PROMPT, "sampling": Sampling(max_tokens=3), **changes}
        state = SequenceState(
            owner="test",
            request_id="r",
            hold_kv=self.name == "held",
            lease=self.lease,
            emitted_token_ids=(5,) if self.lease else (),
            **known,
        )
        await self.driver.engine.submit(state)


@pytest.fixture(params=["plain", "held", "adopted"])
async def way(request):
    """Submit in this way. Afterwards the engine serves a canary, and every block is free."""
    engine = open_modelled(ModelledOptions(model="null", max_model_len=48), name="e")
    async with running(engine) as [driver]:
        found = Way(driver, request.param)
        if request.param == "adopted":
            first = await driver.submit("r", PROMPT, max_tokens=3, hold_kv=True)
            await first.done.wait()
            found.lease = first.lease
        yield found
        engine.cancel("r", 0, 0)
        canary = await driver.submit("canary", PROMPT, max_tokens=3)
        await canary.done.wait()
        assert canary.last.finish_reason == "length"


@pytest.mark.parametrize("token", BAD_IDS)
async def test_a_token_that_is_none(way, token):
    with pytest.raises(EngineRefusal, match="the prompt has") as refused:
        await way.submit(prompt_token_ids=(*PROMPT, token))
    assert refused.value.code == "bad_request"


@pytest.mark.parametrize("sampling", BAD_SAMPLING, ids=str)
async def test_sampling_outside_its_ranges(way, sampling):
    with pytest.raises(EngineRefusal) as refused:
        await way.submit(sampling=Sampling(**sampling))
    assert any(name in str(refused.value) for name in sampling)


@pytest.mark.parametrize("num_tokens", [0, 48, 49, 10**6])
async def test_a_prompt_of_no_possible_length(way, num_tokens):
    with pytest.raises(EngineRefusal, match="empty" if not num_tokens else str(num_tokens)):
        await way.submit(prompt_token_ids=(1,) * num_tokens)


async def test_a_time_that_is_none(way):
    with pytest.raises(EngineRefusal, match="expires_s"):
        await way.submit(expires_s=float("nan"))


@pytest.mark.parametrize("change", [{"num_tokens": 1}, {"engine": "other"}, {"replica": 1}])
async def test_a_lease_that_is_not_what_it_says(change):
    engine = open_modelled(ModelledOptions(model="null", max_model_len=48), name="e")
    async with running(engine) as [driver]:
        first = await driver.submit("r", PROMPT, max_tokens=3, hold_kv=True)
        await first.done.wait()
        forged = msgspec.structs.replace(first.lease, **change)
        known = PROMPT[: forged.num_tokens]
        with pytest.raises(StaleLease):
            await driver.submit("r", known, lease=forged, emitted_token_ids=(5,))
        engine.cancel("r", 0, 0)


@pytest.mark.parametrize("num_tokens", [0, -5])
async def test_an_offer_of_nothing(num_tokens):
    engine = open_modelled(ModelledOptions(model="null"), name="e")
    layout_hash = engine.facts.layout_hash
    offer = LeaseOffer(
        request_id="r", choice=0, epoch=0, num_tokens=num_tokens, layout_hash=layout_hash
    )
    async with running(engine):
        with pytest.raises(EngineRefusal, match="empty"):
            await engine.import_(offer)
