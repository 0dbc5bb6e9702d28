"""The same metrics under the names that vLLM and its HTTP instrumentator use."""

from collections.abc import Callable, Iterator
from itertools import zip_longest

from prometheus_client.core import Metric

from sagellm.gateway.metrics.meters import (
    HANDLER_S,
    NOT_MEASURED,
    UNKNOWN,
    Counts,
    EndpointCall,
    HttpMeters,
)
from sagellm.gateway.metrics.snapshot import (
    EngineReading,
    Labels,
    ModelReading,
    Snapshot,
    counter,
    gauge,
    histogram,
)
from sagellm.runtime.containers import Buckets
from sagellm.runtime.port import DraftCounts, EngineLoad

_NO_HANDLER = "none"  # for unknown paths


def instrumentator_families(http: HttpMeters) -> Iterator[Metric]:
    """Yield the HTTP metrics as vLLM has them: status codes are grouped ("2xx").

    Calls to the paths of NOT_MEASURED are left out.
    """
    yield counter("http_requests", "Calls that ended.", _requests(http))
    seconds = [
        (_http_labels(call), taken)
        for call, taken in http.seconds.items()
        if call.endpoint not in NOT_MEASURED
    ]
    yield histogram("http_request_duration_seconds", "Time of calls.", seconds, HANDLER_S)
    every: list[tuple[Labels, Buckets]] = [({}, http.all_seconds)]
    yield histogram("http_request_duration_highr_seconds", "Time of all calls.", every)


def _requests(http: HttpMeters) -> list[tuple[Labels, float]]:
    grouped: dict[tuple[EndpointCall, str], int] = {}
    for (call, status), number in http.responses.items():
        if call.endpoint not in NOT_MEASURED:
            key = call, f"{status // 100}xx"
            grouped[key] = grouped.get(key, 0) + number
    return [
        ({**_http_labels(call), "status": status}, number)
        for (call, status), number in grouped.items()
    ]


def _http_labels(call: EndpointCall) -> Labels:
    handler = _NO_HANDLER if call.endpoint == UNKNOWN else call.endpoint
    return {"handler": handler, "method": call.method}


ENGINE = "0"
_FINISHED = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "expired": "abort",
    "filtered": "abort",
    "failed": "error",
}
_REJECTED = {"queue_full": "max_num_queued_reqs"}
# Cache tiers of vLLM that do not exist here. They are shown as 0 for dashboards.
_OTHER_CACHES = ("host", "p2p", "disk", "external_unspecified")
_SLEEP_STATES = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}

# Each table maps the end of a metric's name to the metric's help text and its value.
_COUNTERS: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "prompt_tokens": ("Prompt tokens of requests that were prefilled.", lambda c: c.prompt_tokens),
    "prompt_tokens_cached": ("Prompt tokens found in a cache.", lambda c: c.cached_tokens),
    "generation_tokens": ("Tokens delivered.", lambda c: c.generation_tokens),
    "external_prefix_cache_queries": (
        "Tokens that an engine asked another's pool for.",
        lambda c: c.kv_transfer_tokens,
    ),
    "external_prefix_cache_hits": (
        "Tokens that came from another engine's pool.",
        lambda c: c.kv_transfer_tokens,
    ),
}
_ENGINE_COUNTERS: dict[str, tuple[str, Callable[[EngineLoad], int]]] = {
    "prefix_cache_queries": ("Tokens looked up in a cache.", lambda e: e.num_prefix_queries),
    "prefix_cache_hits": ("Tokens found in a cache.", lambda e: e.num_prefix_hits),
    "num_preemptions": ("Sequences put back.", lambda e: e.num_preemptions),
}
_DRAFTS: dict[str, tuple[str, Callable[[DraftCounts], int]]] = {
    "drafts": ("Drafts that were verified.", lambda d: d.num_drafts),
    "draft_tokens": ("Tokens in them.", lambda d: d.num_draft_tokens),
    "accepted_tokens": ("Tokens in them that were right.", lambda d: d.num_accepted_tokens),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[Counts], Buckets]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", lambda c: c.ttft),
    "inter_token_latency_seconds": ("Between two deliveries of tokens.", lambda c: c.itl),
    "request_time_per_output_token_seconds": ("Mean time a token.", lambda c: c.tpot),
    "e2e_request_latency_seconds": ("From arrival to the end.", lambda c: c.e2e),
    "request_queue_time_seconds": ("From arrival to an engine.", lambda c: c.queue),
    "request_inference_time_seconds": ("In engines.", lambda c: c.inference),
    "request_prefill_time_seconds": ("Until the first token was drawn.", lambda c: c.prefill),
    "request_decode_time_seconds": ("From the first token to the end.", lambda c: c.decode),
    "request_prompt_tokens": ("Length of prompts.", lambda c: c.prompt_len),
    "request_prefill_kv_computed_tokens": ("Prompt tokens computed.", lambda c: c.computed_len),
    "request_generation_tokens": ("Length of answers.", lambda c: c.generation_len),
    "request_max_num_generation_tokens": ("Longest choice.", lambda c: c.longest_len),
    "request_params_max_tokens": ("The parameter max_tokens.", lambda c: c.max_tokens),
    "request_num_preemptions": ("Times that it was put back.", lambda c: c.num_preemptions),
    "request_params_n": ("The parameter n.", lambda c: c.num_choices),
}


def vllm_families(shown: Snapshot) -> Iterator[Metric]:
    """Yield the metric families vllm:*."""
    yield from _gauges(shown)
    yield from _counters(shown)
    for name, (documentation, of) in _HISTOGRAMS.items():
        values = [(_labels(model), of(counts)) for model, counts in shown.counts.items()]
        yield histogram(f"vllm:{name}", documentation, values)
    yield from _steps(shown)


def _labels(model: str, **more: str) -> Labels:
    return {"model_name": model, "engine": ENGINE, **more}


def _gauges(shown: Snapshot) -> Iterator[Metric]:
    running = [(_labels(model.name), model.num_running) for model in shown.models]
    waits = [(_labels(model.name), model.num_waiting) for model in shown.models]
    waiting = [(_labels(m.name, reason="capacity"), m.num_waiting) for m in shown.models]
    usage = [(_labels(model.name), model.kv_usage) for model in shown.models]
    sleep = [
        (_labels(model.name, sleep_state=state), on)
        for model in shown.models
        for state, on in _SLEEP_STATES.items()
    ]
    cache = [
        (_cache_labels(model.name, engine), 1) for model in shown.models for engine in model.engines
    ]
    yield gauge("vllm:num_requests_running", "In an engine.", running)
    yield gauge("vllm:num_requests_waiting", "Not in an engine.", waits)
    yield gauge("vllm:num_requests_waiting_by_reason", "Not in an engine, by reason.", waiting)
    yield gauge("vllm:kv_cache_usage_perc", "Leased, 0 to 1.", usage)
    yield gauge("vllm:engine_sleep_state", "1 for the state that holds.", sleep)
    yield gauge("vllm:cache_config_info", "The KV pools, one a replica of an engine.", cache)


def _cache_labels(model: str, engine: EngineReading) -> Labels:
    facts = engine.facts
    return _labels(
        model,
        pool=f"{engine.name}/{engine.replica}",
        block_size=str(facts.block_size),
        num_gpu_blocks=str(facts.num_blocks),
    )


def _counters(shown: Snapshot) -> Iterator[Metric]:
    for name, (documentation, of) in _COUNTERS.items():
        values = [(_labels(model), of(counts)) for model, counts in shown.counts.items()]
        yield counter(f"vllm:{name}", documentation, values)
    yield counter("vllm:prompt_tokens_by_source", "Where they came from.", _by_source(shown))
    yield counter("vllm:prompt_tokens_cached_by_source", "By cache.", _cached_by_source(shown))
    yield counter("vllm:request_success", "Requests that ended.", _by_reason(shown))
    yield counter("vllm:admission_rejections", "Refused while it was full.", _rejections(shown))
    for name, (documentation, of_load) in _ENGINE_COUNTERS.items():
        totals = [
            (_labels(model.name), sum(of_load(engine.load) for engine in model.engines))
            for model in shown.models
        ]
        yield counter(f"vllm:{name}", documentation, totals)
    yield from _drafts(shown)


def _drafts(shown: Snapshot) -> Iterator[Metric]:
    """Yield the metrics of speculative decoding; nothing without speculative engines, as vLLM."""
    found = {model.name: _draft_counts(model) for model in shown.models}
    every = {name: drafts for name, drafts in found.items() if drafts}
    if not every:
        return
    for name, (documentation, of) in _DRAFTS.items():
        values = [(_labels(model), sum(map(of, drafts))) for model, drafts in every.items()]
        yield counter(f"vllm:spec_decode_num_{name}", documentation, values)
    places: list[tuple[Labels, float]] = [
        (_labels(model, position=str(at)), sum(numbers))
        for model, drafts in every.items()
        for at, numbers in enumerate(zip_longest(*(d.accepted_at for d in drafts), fillvalue=0))
    ]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    yield counter(name, "Draft tokens that were right, by place in the draft.", places)


def _draft_counts(model: ModelReading) -> list[DraftCounts]:
    return [engine.load.drafts for engine in model.engines if engine.load.drafts.accepted_at]


def _by_source(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for model, counts in shown.counts.items():
        num_computed = counts.prompt_tokens - counts.cached_tokens
        yield _labels(model, source="local_compute"), num_computed
        yield _labels(model, source="local_cache_hit"), counts.cached_tokens
        # Always 0: transferred tokens were prefilled in this graph, and are counted above.
        yield _labels(model, source="external_kv_transfer"), 0


def _cached_by_source(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for model, counts in shown.counts.items():
        yield _labels(model, source="device"), counts.cached_tokens
        for source in _OTHER_CACHES:
            yield _labels(model, source=source), 0


def _by_reason(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    """Yield the number of ended requests for each of vLLM's reasons."""
    # Refused requests are left out: vLLM counts them as rejections only.
    for model, counts in shown.counts.items():
        totals = dict.fromkeys(_FINISHED.values(), 0)
        for reason, number in counts.ended.items():
            if reason in _FINISHED:
                totals[_FINISHED[reason]] += number
        for reason, number in totals.items():
            yield _labels(model, finished_reason=reason), number


def _rejections(shown: Snapshot) -> Iterator[tuple[Labels, float]]:
    for model, counts in shown.counts.items():
        for code, reason in _REJECTED.items():
            number = sum(n for (known, _), n in counts.rejected.items() if known == code)
            yield {"model_name": model, "reason": reason}, number


def _steps(shown: Snapshot) -> Iterator[Metric]:
    """Yield the histogram of tokens computed in one step, for each model.

    Engines that do not count the tokens of steps are left out.
    """
    values = [
        (_labels(model.name), total)
        for model in shown.models
        if (total := _step_tokens(model)) is not None
    ]
    if values:
        yield histogram("vllm:iteration_tokens_total", "Tokens computed in one step.", values)


def _step_tokens(model: ModelReading) -> Buckets | None:
    """Return the sum of the engines' histograms; None if no engine has one."""
    counted = [engine.step_tokens for engine in model.engines if engine.step_tokens is not None]
    total = counted[0].copy() if counted else None
    for other in counted[1:]:
        assert total is not None
        total.add(other)
    return total
