"""/metrics: what Prometheus reads is what happened."""

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import trio
from endings import generate
from prometheus_client import REGISTRY, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from trio.testing import MockClock

from sagellm import Sampling
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.gateway.metrics.meters import TTFT_S

TEN = Sampling(max_tokens=10, ignore_eos=True)


class Samples:
    """The samples of one scrape by name; labels narrow them down."""

    def __init__(self, families: Iterator[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self._all = [one for family in self.families.values() for one in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        found = [
            one.value
            for one in self._all
            if one.name == name and labels.items() <= one.labels.items()
        ]
        assert found, f"{name} {labels} is not there"
        return sum(found)

    def labels(self, label: str) -> set[str]:
        return {one.labels[label] for one in self._all if label in one.labels}

    def __len__(self) -> int:
        return len(self._all)


async def scrape(meters: GatewayMeters) -> Samples:
    body, content_type = await meters.exposition()
    assert content_type.startswith("text/plain; version=")
    return Samples(parse(body.decode()))


async def test_requests_and_tokens(opened: Any, autojump_clock: MockClock) -> None:
    async with opened() as (session, meters):
        for number in range(3):
            prompt = [number] * 100
            await session.generate(prompt, sampling=TEN, model=("m", "alias", "x")[number])
        shown = await scrape(meters)
    assert shown("vllm:request_success_total", finished_reason="length", model_name="m") == 2
    assert shown("vllm:generation_tokens_total", model_name="m") == 20
    assert shown("vllm:generation_tokens_total", model_name="unknown") == 10
    assert shown("vllm:prompt_tokens_total") == 300
    assert shown("vllm:time_to_first_token_seconds_count") == 3
    assert shown("vllm:inter_token_latency_seconds_count") == 27
    assert shown("sagellm_requests_total", finish_reason="length") == 3
    assert shown("sagellm_kv_transfer_seconds_count") == 3
    assert shown("sagellm_operator_in_total", operator="admission") == 3
    assert shown("sagellm_edge_items_total", source="prefill") == 3
    assert shown("vllm:iteration_tokens_total_sum") >= 300


@pytest.mark.parametrize("graph", ["joint", "pd"])
async def test_what_prefixes_spared(opened: Any, graph: str, autojump_clock: MockClock) -> None:
    apart = {"split.min_uncached_tokens": 0} if graph == "pd" else {}  # cached prompts, too
    async with opened(graph, **apart) as (session, meters):
        for _ in range(3):
            await session.generate([1] * 100, sampling=TEN, model="m")
        shown = await scrape(meters)
    assert shown("vllm:prefix_cache_queries_total") == 300
    assert shown("vllm:prefix_cache_hits_total") == 2 * 96
    assert shown("vllm:prompt_tokens_cached_total") == 2 * 96
    assert shown("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 2 * 96
    assert shown("vllm:prompt_tokens_by_source_total", source="local_compute") == 300 - 192
    assert shown("vllm:prompt_tokens_cached_by_source_total", source="device") == 2 * 96
    assert shown("vllm:prompt_tokens_cached_by_source_total") == 2 * 96
    num_moved = 300 if graph == "pd" else 0
    assert shown("vllm:external_prefix_cache_queries_total") == num_moved
    assert shown("vllm:external_prefix_cache_hits_total") == num_moved
    assert shown("vllm:request_prefill_kv_computed_tokens_sum") == 300 - 192
    assert shown("sagellm_engine_prefix_hit_tokens_total") == 2 * 96
    assert shown("sagellm_engine_kv_cached_blocks") > 0
    assert shown("sagellm_engine_known_prefix_blocks") == 0  # nobody asks
    assert shown("vllm:kv_cache_usage_perc") == 0


async def test_what_routers_know_of_each_replica(opened: Any, autojump_clock: MockClock) -> None:
    async with opened("pd") as (session, meters):
        for _ in range(2):
            await session.generate([1] * 100, sampling=TEN, model="m")
        shown = await scrape(meters)
    known = [shown("sagellm_engine_known_prefix_blocks", engine=name) for name in ("p", "d")]
    assert known == [shown("sagellm_engine_kv_cached_blocks", engine=name) for name in ("p", "d")]
    assert min(known) > 0


async def test_preemptions_are_counted_for_each_request(
    opened: Any, autojump_clock: MockClock
) -> None:
    long = Sampling(max_tokens=300, ignore_eos=True)
    async with opened("joint", **{"g.num_blocks": 32, "g.max_model_len": 400}) as (session, meters):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(lambda n: session.generate([n] * 32, sampling=long), number)
        shown = await scrape(meters)
    num_preemptions = shown("vllm:num_preemptions_total")
    assert num_preemptions > 0
    assert shown("vllm:request_num_preemptions_sum") == num_preemptions
    assert shown("vllm:request_num_preemptions_count") == 4


async def test_requests_put_back_for_others_are_counted_by_class(
    opened: Any, autojump_clock: MockClock
) -> None:
    options = {"g.max_num_seqs": 1, "sort.preempts": {"critical": "low"}}
    long = Sampling(max_tokens=300, ignore_eos=True)
    async with opened("joint", **options) as (session, meters):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: session.generate([1] * 32, sampling=long, priority="background")
            )
            await trio.sleep(0.1)
            await session.generate([2] * 32, sampling=TEN, priority="critical")
        shown = await scrape(meters)
    assert shown("sagellm_requests_preempted_total", **{"class": "background"}) == 1
    assert not shown.families.keys() & {"sagellm_operator_budget_misses"}


async def test_budgets_of_operators(opened: Any, autojump_clock: MockClock) -> None:
    options = {"budgets.slo_ttft_s": 5.0, "budgets.slo_tpot_s": 1e-6}
    async with opened("pd", **options) as (session, meters):
        for number in range(3):
            await session.generate([number] * 100, sampling=TEN, model="m")
        shown = await scrape(meters)
    prefill = {"operator": "prefill", "budget": "ttft"}
    decode = {"operator": "decode", "budget": "tpot"}
    assert shown("sagellm_operator_budget_requests_total", **prefill) == 3
    assert shown("sagellm_operator_budget_misses_total", **prefill) == 0
    assert shown("sagellm_operator_budget_slack_seconds", **prefill) > 0
    assert shown("sagellm_operator_budget_misses_total", **decode) == 3
    assert shown("sagellm_operator_budget_slack_seconds", **decode) < 0


async def test_gauges_show_the_moment(opened: Any, autojump_clock: MockClock) -> None:
    long = Sampling(max_tokens=500, ignore_eos=True)
    async with opened("joint", **{"g.max_num_seqs": 4}) as (session, meters):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(lambda: session.generate([1] * 32, sampling=long))
            await trio.sleep(0.5)
            shown = await scrape(meters)
            nursery.cancel_scope.cancel()
        await session.idle()
        rest = await scrape(meters)
    assert shown("vllm:num_requests_running") == 4
    assert shown("vllm:num_requests_waiting") == 6
    assert 0 < shown("vllm:kv_cache_usage_perc") < 1
    assert shown("sagellm_operator_queue_depth", operator="sort") == 6
    assert shown("sagellm_operator_queue_capacity", operator="sort") == 4096
    assert rest("vllm:num_requests_running") == rest("vllm:num_requests_waiting") == 0
    assert rest("vllm:kv_cache_usage_perc") == 0
    assert rest("vllm:request_success_total", finished_reason="abort") == 10


async def test_shares_are_of_the_last_seconds(opened: Any, autojump_clock: MockClock) -> None:
    async with opened("joint") as (session, meters), trio.open_nursery() as nursery:
        nursery.start_soon(meters.run)
        await session.generate([1] * 32, sampling=Sampling(max_tokens=1000, ignore_eos=True))
        busy = await scrape(meters)
        await trio.sleep(60)
        idle = await scrape(meters)
        nursery.cancel_scope.cancel()
    assert busy("sagellm_operator_busy_ratio", operator="generate") == pytest.approx(1, abs=0.01)
    assert idle("sagellm_operator_busy_ratio", operator="generate") == 0
    assert idle("sagellm_operator_idle_ratio", operator="generate") == 1
    assert idle("sagellm_event_loop_lag_seconds_count", loop="graph") > 100


async def test_refusals_by_reason_and_class(opened: Any, autojump_clock: MockClock) -> None:
    async with opened("joint", **{"admission.max_queued": 1, "g.max_num_seqs": 1}) as (s, meters):
        async with trio.open_nursery() as nursery:
            for _ in range(9):
                nursery.start_soon(lambda: generate(s, [1], sampling=TEN, priority="high"))
        shown = await scrape(meters)
        refused = s.executor.core.ledger.ended["refused"]
    assert refused > 0
    assert shown("sagellm_admission_rejections_total", **{"class": "high"}) == refused


async def test_a_scrape_from_another_thread_reads_on_the_graphs_own(opened: Any) -> None:
    async with opened("joint") as (session, meters):
        await session.generate([1], sampling=TEN)
        taken_in: list[int] = []
        take = meters._take

        def noting() -> Any:
            taken_in.append(threading.get_ident())
            return take()

        meters._take = noting
        scraped = await trio.to_thread.run_sync(lambda: anyio.run(scrape, meters))
    assert scraped("vllm:generation_tokens_total") == 10
    assert taken_in == [threading.get_ident()]


async def test_openmetrics_is_given_to_who_asks(opened: Any) -> None:
    async with opened() as (_, meters):
        body, content_type = await meters.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert "vllm:prompt_tokens" in Samples(parse_open(body.decode())).families


async def test_without_vllm_only_ours_are_shown(opened: Any) -> None:
    async with opened(compat=()) as (_, meters):
        shown = await scrape(meters)
    assert not [name for name in shown.families if name.startswith("vllm:")]
    assert "sagellm_generation_tokens" in shown.families


async def test_nothing_of_the_process_registry_is_touched(opened: Any) -> None:
    before = set(REGISTRY._names_to_collectors)
    async with opened() as (_, first), opened("joint") as (_, second):
        await scrape(first)
        shown = await scrape(second)
    assert set(REGISTRY._names_to_collectors) == before
    assert not [name for name in shown.families if name.startswith("python_")]


async def test_names_and_help_are_as_prometheus_wants_them(opened: Any) -> None:
    async with opened() as (session, meters):
        await session.generate([1] * 40, sampling=TEN)
        body, _ = await meters.exposition()
    declared = re.findall(r"^# TYPE (\S+) (\S+)$", body.decode(), re.M)
    assert len(declared) == len(set(declared)) > 60
    for name, kind in declared:
        assert re.fullmatch(r"[a-z_:][a-z0-9_:]*", name)
        assert re.search(rf"^# HELP {re.escape(name)} \S", body.decode(), re.M)
        assert (kind == "counter") <= name.endswith("_total")


async def test_buckets_are_those_of_vllm(opened: Any) -> None:
    async with opened() as (_, meters):
        shown = await scrape(meters)

    def found(name: str) -> list[float]:
        samples = shown.families[name].samples
        return [float(one.labels["le"]) for one in samples if one.name.endswith("_bucket")][:-1]

    assert found("vllm:time_to_first_token_seconds") == [*TTFT_S]
    assert found("vllm:request_params_n") == [1, 2, 5, 10, 20]
    assert found("vllm:request_prompt_tokens") == [
        1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000,
    ]  # fmt: skip
    assert found("vllm:iteration_tokens_total")[:4] == [1, 8, 16, 32]


async def test_a_hundred_thousand_model_names_are_two_labels(
    opened: Any, autojump_clock: MockClock
) -> None:
    async with opened("joint") as (session, meters):
        before = len(await scrape(meters))
        for number in range(300):
            model = f'm"}} 1\nvllm:x{{a="{number}'
            await session.generate([1], sampling=Sampling(max_tokens=1), model=model)
        once = len(await scrape(meters))
        await session.generate([1], sampling=Sampling(max_tokens=1), model="one more")
        shown = await scrape(meters)
    assert shown.labels("model_name") == {"m", "unknown"}
    assert len(shown) == once < 2 * before


@pytest.mark.alone
async def test_a_scrape_takes_milliseconds(opened: Any, autojump_clock: MockClock) -> None:
    async with opened() as (session, meters):
        await session.generate([1] * 100, sampling=TEN)
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            await meters.exposition()
            times.append(time.perf_counter() - begun)
    assert min(times) < 0.05  # 0.013 on an idle core; a busy machine is no failure


async def test_the_lag_of_the_apps_own_loop_is_shown_beside(opened: Any) -> None:
    async with opened("joint") as (_, meters):
        assert "app" not in (await scrape(meters)).labels("loop")
        meters.app_lag.seconds.observe(0.25)
        shown = await scrape(meters)
    assert shown("sagellm_event_loop_lag_seconds_sum", loop="app") == 0.25
