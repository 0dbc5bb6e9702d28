"""How many calls openai-python makes of one where the server refuses most of them."""

import asyncio
import random
import time
from contextlib import suppress

import openai
from gateway_overload import MEAN_TOKENS
from gateway_process import ServedProcess

NUM_RETRIES = 2
AMPLIFICATION = 1.2


def amplification(served: ServedProcess, rate: float, seconds: float) -> float:
    """Calls that reach the server for each that openai-python's retrying client was asked for."""
    before = num_calls(served)
    num_asked = asyncio.run(_retried(served.url, rate, seconds))
    found = (num_calls(served) - before) / num_asked
    print(f"{rate:.0f}/s: {num_asked} asked for, amplified {found:.3f} times")
    return found


def num_calls(served: ServedProcess) -> float:
    """Of completions, those refused too."""
    metrics, name = served.metrics(), "sagellm_http_requests_total{"
    return sum(metrics[key] for key in metrics if key.startswith(name) and "completions" in key)


async def _retried(url: str, rate: float, seconds: float) -> int:
    """Poisson arrivals for so long, each with its retries; how many there were."""
    draw, asked = random.Random(0), []
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=NUM_RETRIES, timeout=60
    ) as client:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            asked.append(asyncio.create_task(_ask(client)))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*asked)
    return len(asked)


async def _ask(client: openai.AsyncOpenAI) -> None:
    with suppress(openai.InternalServerError):  # refused, and its retries too
        await client.completions.create(
            model="sage-tiny",
            prompt=[1] * 64,
            max_tokens=MEAN_TOKENS,
            extra_body={"ignore_eos": True},
        )
