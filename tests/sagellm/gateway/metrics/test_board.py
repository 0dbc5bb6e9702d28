"""The Grafana board: every metric that it asks for exists, and moves when requests come."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from endings import generate
from prometheus_client.parser import text_string_to_metric_families as parse
from trio.testing import MockClock

from sagellm import Sampling
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.session import Session

FOLDER = Path(__file__).parents[4] / "examples" / "observability"
NAMES = re.compile(r"\b(?:vllm:|sagellm_)\w+")
# What only a fault, a full pool or an operator that raises would move.
STILL = {
    "sagellm_operator_errors_total",
    "vllm:num_preemptions_total",
    "sagellm_operator_queue_capacity",
}


@pytest.fixture
def board() -> Any:
    return json.loads((FOLDER / "grafana" / "sagellm.json").read_text())


def expressions(board: Any) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


async def values(meters: GatewayMeters) -> dict[str, set[float]]:
    body, _ = await meters.exposition()
    found: dict[str, set[float]] = {}
    for family in parse(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).add(sample.value)
    return found


async def load(session: Session, meters: GatewayMeters) -> list[dict[str, set[float]]]:
    """Served, refused, cancelled; scraped while requests wait, and later."""
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    meters.request_started("/v1/completions", "POST")
    meters.request_started("/v1/completions", "POST")
    meters.request_ended("/v1/completions", "POST", 200, 0.1)
    meters.disconnected()
    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(lambda: generate(session, [1] * 100, sampling=sampling))
        await trio.sleep(0.02)
        early = await values(meters)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    return [early, await values(meters)]


async def test_every_metric_exists_and_moves(
    board: Any, opened: Any, autojump_clock: MockClock
) -> None:
    names = {name for text in expressions(board) for name in NAMES.findall(text)}
    assert len(names) > 30
    queued = {"admission.max_queued": 20}
    async with opened(**queued) as (session, meters), trio.open_nursery() as nursery:
        nursery.start_soon(meters.run)
        before = await values(meters)
        await trio.sleep(1)
        after = await load(session, meters)
        nursery.cancel_scope.cancel()
    assert not sorted(name for name in names if name not in after[-1])
    still = {name for name in names if all(before.get(name) == each[name] for each in after)}
    assert not sorted(still - STILL)


def test_panels_cover_what_a_board_of_this_field_has(board: Any) -> None:
    titles = " ".join(panel["title"].lower() for panel in board["panels"])
    for word in ("end-to-end", "first token", "inter-token", "token throughput", "scheduler",
                 "cache", "prompt length", "generation length", "finish reason", "queue", "prefill",
                 "decode", "busy", "back-pressured", "refused"):  # fmt: skip
        assert word in titles


def test_panels_do_not_overlap(board: Any) -> None:
    cells = [
        (x, y)
        for panel in board["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
